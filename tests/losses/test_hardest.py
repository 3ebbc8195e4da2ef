"""The mean of the largest values: the right number of them, and ties that share a place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg.losses.hardest import mean_of_hardest
from medseg.losses.sums import settle


def mean(values: Tensor, counted: Tensor | None = None, *, percent: float) -> Tensor:
    return settle([mean_of_hardest(values, counted, percent=percent)])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percent", [0.001, 1, 10, 12.5, 33.3, 50, 99.9, 100])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_values_are_those_of_a_sorted_list(
    dtype: torch.dtype, percent: float, scale: float, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn((5, 7, 11), generator=generator, dtype=dtype).exp() * scale
    values[:, ::2, 3] = 0
    counted = torch.rand((5, 1, 11), generator=generator) > 0.3 if masked else None
    kept = values if counted is None else values[counted.expand_as(values)]
    ordered = sorted(kept.flatten().tolist(), reverse=True)
    number = max(1, int(len(ordered) * percent / 100))
    expected = sum(ordered[:number]) / number
    found = mean(values, counted, percent=percent)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_equal_values_share_the_places_that_are_left() -> None:
    """Three places: one for the 5, two for the four 2s; the ignored 9 takes none."""
    values = torch.tensor([2.0, 5, 2, 1, 2, 9, 0, 2]).requires_grad_()
    counted = torch.tensor([True, True, True, True, True, False, True, True])
    found = mean(values, counted, percent=3 / 7 * 100 + 1e-3)
    (gradient,) = torch.autograd.grad(found, values)
    assert float(found.detach()) == pytest.approx((5 + 2 + 2) / 3)
    expected = torch.tensor([0.5, 1, 0.5, 0, 0.5, 0, 0, 0.5]) / 3
    torch.testing.assert_close(gradient, expected)


def test_signs_of_zero_and_of_rounding_do_not_disturb_the_order() -> None:
    values = torch.tensor([-0.0, 0.25, -1e-9, 0.5, 0.0])
    assert float(mean(values, percent=40)) == pytest.approx(0.375)
    assert float(mean(values, percent=100)) == pytest.approx(0.15)


def test_what_is_not_a_number_is_not_overlooked() -> None:
    values = torch.tensor([0.1, -float("nan"), 0.3, 0.2])
    assert mean(values, percent=25).isnan()
    counted = torch.tensor([True, False, True, True])
    assert float(mean(values, counted, percent=34)) == pytest.approx(0.3)


def test_of_nothing_it_is_zero() -> None:
    values = torch.tensor([3.0, 4.0]).requires_grad_()
    found = mean(values, torch.tensor([False, False]), percent=50)
    (gradient,) = torch.autograd.grad(found, values)
    assert float(found.detach()) == 0
    assert gradient.tolist() == [0, 0]
