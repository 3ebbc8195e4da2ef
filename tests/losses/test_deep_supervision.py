"""Deep supervision: weights, targets at lower resolutions, and the losses by name."""

from __future__ import annotations

import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medseg.errors import ConfigError
from medseg.losses.compound import LOSSES
from medseg.losses.deep_supervision import (
    DeepSupervision,
    build_loss,
    nearest,
    resolution_weights,
)


def pyramid() -> tuple[list[Tensor], Tensor, Tensor]:
    """Return logits at three resolutions, labels and mask of an anisotropic patch."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((6, 8, 10), (6, 4, 5), (3, 2, 5))
    logits = [torch.randn(2, 3, *shape, generator=generator) for shape in shapes]
    target = torch.randint(0, 3, (2, *shapes[0]), generator=generator)
    return logits, target, torch.rand(target.shape, generator=generator) > 0.2


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_weights_halve_end_in_zero_and_sum_to_one(count: int) -> None:
    weights = resolution_weights(count)
    assert len(weights) == count
    assert weights[-1] == 0
    assert sum(weights) == pytest.approx(1)
    assert all(b == pytest.approx(a / 2) for a, b in pairwise(weights[:-1]))


def test_single_output_counts_fully() -> None:
    logits, target, valid = pyramid()
    loss = build_loss("dice_ce", batch_dice=False, has_regions=False)
    torch.testing.assert_close(loss(logits[:1], target, valid), loss(logits[0], target, valid))


@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (6, 5, 7), (2, 10, 3), (4, 3, 6), (1, 9, 14), (5, 7, 11)]
)
def test_nearest_takes_the_voxels_of_nearest_exact(shape: tuple[int, ...]) -> None:
    values = torch.arange(2 * 6 * 10 * 14).reshape(2, 6, 10, 14)
    expected = functional.interpolate(values[None].double(), shape, mode="nearest-exact")[0]
    found = nearest(values, shape)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected.long())
    assert torch.equal(nearest(values % 3 == 0, shape), found % 3 == 0)


@pytest.mark.parametrize("masked", [False, True])
def test_terms_are_weighted_losses_of_down_sampled_targets(masked: bool) -> None:
    logits, target, valid = pyramid()
    single = LOSSES["dice_ce"](batch_dice=True, has_regions=False)
    coarse = target[:, :, 1::2, 1::2]
    masks = (valid, valid[:, :, 1::2, 1::2]) if masked else (None, None)
    expected = 2 / 3 * single(logits[0], target, masks[0]) + 1 / 3 * single(
        logits[1], coarse, masks[1]
    )
    loss = build_loss("dice_ce", batch_dice=True, has_regions=False)
    torch.testing.assert_close(loss(logits, target, valid if masked else None), expected)


def test_coarsest_logits_get_no_gradient() -> None:
    logits, target, _ = pyramid()
    logits = [each.requires_grad_() for each in logits]
    loss = build_loss("dice_ce", batch_dice=True, has_regions=False)
    gradients = torch.autograd.grad(loss(logits, target), logits, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True]


def test_regions_are_down_sampled_like_labels() -> None:
    logits, target, _ = pyramid()
    regions = torch.stack([target >= 1, target == 2, target == 1], 1)
    loss = build_loss("dice_ce", batch_dice=False, has_regions=True)
    coarse = [target, target[:, :, 1::2, 1::2]]
    single = LOSSES["dice_ce"](batch_dice=False, has_regions=True)
    expected = sum(
        weight * single(each, torch.stack([own >= 1, own == 2, own == 1], 1), None)
        for weight, each, own in zip((2 / 3, 1 / 3), logits, coarse, strict=False)
    )
    torch.testing.assert_close(loss(logits, regions), expected)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name is 'dice_cee'.*Did you mean 'dice_ce'\?"):
        build_loss("dice_cee", batch_dice=True, has_regions=False)


def test_own_losses_come_by_module_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_losses")
    module.Half = lambda *, batch_dice, has_regions: lambda logits, target, valid: logits.mean() / 2
    monkeypatch.setitem(sys.modules, "own_losses", module)
    loss = build_loss("own_losses:Half", batch_dice=True, has_regions=False)
    assert isinstance(loss, DeepSupervision)
    logits, target, _ = pyramid()
    torch.testing.assert_close(loss(logits[0], target), logits[0].mean() / 2)
    for name in ("own_losses:Third", "no_such_module:Half", ":Half"):
        with pytest.raises(ConfigError, match="does not import"):
            build_loss(name, batch_dice=True, has_regions=False)
