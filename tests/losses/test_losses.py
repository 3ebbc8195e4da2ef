"""Every loss against a slow walk over voxels: labels, regions, masks, partial samples."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg.losses.compound import LOSSES, Loss
from medseg.losses.dice import sum_by_label
from tests.losses.oracle import slow_loss

SPACES = {"3d": (3, 5, 4), "2d": (7, 5)}
SAMPLES = 3
LOGITS = 3
ANNOTATED = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
"""Labels, background first; regions: the same columns."""


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(space: tuple[int, ...] = SPACES["3d"]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, LOGITS, *space)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values[1] *= 4
    return values


def labels(space: tuple[int, ...] = SPACES["3d"], annotated: Tensor | None = None) -> Tensor:
    """Return labels whose shares differ between samples; sample 2 has no label 2.

    What was not annotated is background.
    """
    chance = uniform(2, SAMPLES, *space)
    found = (chance > 0.5).long() + (chance > 0.8).long()
    found[2] = found[2].clamp_max(1)
    if annotated is None:
        return found
    is_drawn = annotated.gather(1, found.flatten(1)).view(found.shape)
    return torch.where(is_drawn, found, 0)


def regions(space: tuple[int, ...] = SPACES["3d"]) -> Tensor:
    chance = torch.tensor([0.5, 0.2, 0.05]).reshape(1, LOGITS, *[1] * len(space))
    return uniform(3, SAMPLES, LOGITS, *space) < chance


def mask(space: tuple[int, ...] = SPACES["3d"]) -> Tensor:
    return uniform(4, SAMPLES, *space) > 0.3


def target(has_regions: bool, *given: Any) -> Tensor:
    return regions(*given[:1]) if has_regions else labels(*given)


class LossContract:
    """What every named loss must do; sub-classes name it."""

    name: str
    other_options: dict[str, Any]
    """Options that are not the defaults."""
    floor: float
    """Loss of a perfect prediction."""

    def loss(self, *, batch_dice: bool = True, has_regions: bool = False, **options: Any) -> Loss:
        return LOSSES[self.name](batch_dice=batch_dice, has_regions=has_regions, **options)

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("batch_dice", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("partial", [False, True])
    def test_equals_the_slow_walk(
        self, has_regions: bool, batch_dice: bool, masked: bool, partial: bool
    ) -> None:
        for space, options in itertools.product(SPACES.values(), ({}, self.other_options)):
            annotated = ANNOTATED if partial else None
            truth = target(has_regions, space, annotated)
            given = (logits(space), truth, mask(space) if masked else None, annotated)
            expected = slow_loss(self.name, given, batch_dice, **options)
            loss = self.loss(batch_dice=batch_dice, has_regions=has_regions, **options)
            assert float(loss(*given)) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("partial", [False, True])
    def test_gradient_is_the_numerical_one(self, has_regions: bool, partial: bool) -> None:
        corner = (slice(None), Ellipsis, slice(0, 2), slice(1, 2), slice(0, 3))
        annotated = ANNOTATED if partial else None
        truth = target(has_regions, SPACES["3d"], annotated)[corner]
        values = logits()[corner].clone().requires_grad_()
        for valid, batch_dice in ((mask()[corner], False), (None, True)):
            options = self.other_options if batch_dice else {}
            loss = self.loss(batch_dice=batch_dice, has_regions=has_regions, **options)
            assert torch.autograd.gradcheck(
                lambda given, loss=loss, valid=valid: loss(given, truth, valid, annotated),
                (values,),
            )

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_masked_voxels_count_for_nothing(self, has_regions: bool) -> None:
        truth, valid = target(has_regions), mask()
        loss = self.loss(has_regions=has_regions)
        values = logits().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(values, truth, valid), values)
        outside = (~valid).unsqueeze(1).expand_as(gradient)
        assert gradient[outside].abs().max() == 0
        assert gradient[~outside].abs().max() > 0
        changed = torch.where(outside, -3 * logits() + 1, logits())
        assert float(loss(changed, truth, valid)) == pytest.approx(
            float(loss(logits(), truth, valid)), rel=1e-12
        )

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_full_masks_are_no_masks(self, has_regions: bool) -> None:
        truth = target(has_regions)
        valid = torch.ones((SAMPLES, *SPACES["3d"]), dtype=torch.bool)
        annotated = torch.ones_like(ANNOTATED)
        for batch_dice in (False, True):
            loss = self.loss(has_regions=has_regions, batch_dice=batch_dice)
            plain = float(loss(logits(), truth))
            assert float(loss(logits(), truth, valid)) == pytest.approx(plain, rel=1e-12)
            assert float(loss(logits(), truth, None, annotated)) == pytest.approx(plain, rel=1e-12)

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("batch_dice", [False, True])
    def test_nothing_that_counts_gives_a_finite_loss_and_no_gradient(
        self, has_regions: bool, batch_dice: bool
    ) -> None:
        truth = target(has_regions)
        nowhere = torch.zeros((SAMPLES, *SPACES["3d"]), dtype=torch.bool)
        loss = self.loss(has_regions=has_regions, batch_dice=batch_dice)
        for annotated in (None, ANNOTATED):
            values = logits().requires_grad_()
            found = loss(values, truth, nowhere, annotated)
            (gradient,) = torch.autograd.grad(found, values)
            assert torch.isfinite(found)
            assert gradient.abs().max() == 0

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("partial", [False, True])
    def test_huge_logits_give_finite_losses_and_gradients(
        self, has_regions: bool, partial: bool
    ) -> None:
        annotated = ANNOTATED if partial else None
        truth = target(has_regions, SPACES["3d"], annotated)
        for gain, options in itertools.product((1e4, -1e4), ({}, self.other_options)):
            for right in (logits().sign(), _right(truth)):
                values = (gain * right).float().requires_grad_()
                loss = self.loss(has_regions=has_regions, batch_dice=False, **options)
                found = loss(values, truth, None, annotated)
                (gradient,) = torch.autograd.grad(found, values)
                assert torch.isfinite(found)
                assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_low_precision_logits_are_computed_in_fp32(
        self, has_regions: bool, dtype: torch.dtype
    ) -> None:
        coarse = logits().to(dtype).requires_grad_()
        truth = target(has_regions)
        loss = self.loss(has_regions=has_regions)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(coarse, truth)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(coarse.float(), truth), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found, coarse)
        assert gradient.dtype == dtype

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_memory_layout_does_not_matter(self, has_regions: bool) -> None:
        truth = target(has_regions)
        loss = self.loss(has_regions=has_regions)
        turned = logits().contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(loss(turned, truth, None), loss(logits(), truth, None))

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_right_logits_are_better_than_wrong_ones(self, has_regions: bool) -> None:
        truth = target(has_regions)
        right = 10 * _right(truth)
        loss = self.loss(has_regions=has_regions)
        best = float(loss(right, truth, None))
        assert best == pytest.approx(self.floor, abs=0.01)
        assert float(loss(-right, truth, None)) > best + 0.5

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("batch_dice", [False, True])
    def test_no_number_is_asked_for_on_the_way(
        self, has_regions: bool, batch_dice: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors without content have none to tell: asking would wait for an accelerator."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        loss = self.loss(has_regions=has_regions, batch_dice=batch_dice)
        for annotated in (None, ANNOTATED.to("meta")):
            values = logits().to("meta").requires_grad_()
            loss(values, target(has_regions).to("meta"), mask().to("meta"), annotated).backward()
            assert values.grad is not None


def _right(truth: Tensor) -> Tensor:
    """Return 1 where a logit should be large and -1 elsewhere."""
    if truth.dtype == torch.bool:
        return 2 * truth.double() - 1
    return 2 * torch.nn.functional.one_hot(truth, LOGITS).movedim(-1, 1).double() - 1


class TestDice(LossContract):
    name = "dice"
    other_options = {"squared": True, "smooth": 0.5}  # noqa: RUF012
    floor = -1


class TestCrossEntropy(LossContract):
    name = "ce"
    other_options = {}  # noqa: RUF012
    floor = 0


class TestDiceCE(LossContract):
    name = "dice_ce"
    other_options = {"weight_dice": 0.5, "weight_ce": 2, "squared": True}  # noqa: RUF012
    floor = -1


class TestDiceBCE(LossContract):
    name = "dice_bce"
    other_options = {"weight_dice": 0, "weight_bce": 2}  # noqa: RUF012
    floor = -1


class TestDiceTopK(LossContract):
    name = "dice_topk"
    other_options = {"k": 33.3, "weight_topk": 0.5, "smooth": 1}  # noqa: RUF012
    floor = -1


class TestDiceFocal(LossContract):
    name = "dice_focal"
    other_options = {"gamma": 0.5, "weight_focal": 3, "weight_dice": 0.1}  # noqa: RUF012
    floor = -1


class TestTversky(LossContract):
    name = "tversky"
    other_options = {"alpha": 0.8, "beta": 0.1, "smooth": 2}  # noqa: RUF012
    floor = -1


class TestTverskyCE(LossContract):
    name = "tversky_ce"
    other_options = {"alpha": 0, "beta": 1, "weight_tversky": 2, "weight_ce": 0.3}  # noqa: RUF012
    floor = -1


def test_every_named_loss_is_under_the_contract() -> None:
    assert {each.name for each in LossContract.__subclasses__()} == set(LOSSES)


@pytest.mark.parametrize("has_regions", [False, True])
def test_losses_that_should_agree_do(has_regions: bool) -> None:
    given = (logits(), target(has_regions), mask(), ANNOTATED)

    def value(name: str, **options: Any) -> float:
        return float(LOSSES[name](batch_dice=True, has_regions=has_regions, **options)(*given))

    assert value("tversky", alpha=0.5, beta=0.5) == pytest.approx(value("dice"), rel=1e-12)
    assert value("dice_focal", gamma=0) == pytest.approx(value("dice_ce"), rel=1e-12)
    assert value("dice_topk", k=100) == pytest.approx(value("dice_ce"), rel=1e-12)
    assert value("dice_ce", weight_dice=0) == pytest.approx(value("ce"), rel=1e-12)
    if has_regions:
        assert value("dice_bce") == value("dice_ce")
    else:
        assert value("dice_bce") != pytest.approx(value("dice_ce"), rel=1e-3)


def test_a_structure_that_is_absent_counts_by_what_is_found_of_it() -> None:
    """Nothing found of nothing is perfect; half a voxel found of nothing is almost worthless."""
    loss = LOSSES["dice"](batch_dice=True, has_regions=True)
    truth = torch.zeros((1, 1, 2, 3), dtype=torch.bool)
    nothing = torch.full((1, 1, 2, 3), -1e3)
    assert float(loss(nothing, truth)) == pytest.approx(-1)
    half = nothing.clone()
    half[0, 0, 1, 2] = 0
    assert float(loss(half, truth)) == pytest.approx(-1e-5 / (0.5 + 1e-5))


def test_sum_by_label_is_the_same_on_every_kind_of_device() -> None:
    """The path of accelerators is taken by a CPU tensor that says it lies elsewhere."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    values = logits()[:, 0].flatten(1)
    truth = labels().flatten(1)
    expected = [
        [float(row[own == n].sum()) for n in range(4)]
        for row, own in zip(values, truth, strict=True)
    ]
    torch.testing.assert_close(
        sum_by_label(values, truth, 4), torch.tensor(expected, dtype=torch.float64)
    )
    found = sum_by_label(values.as_subclass(Elsewhere), truth, 4)
    torch.testing.assert_close(
        found.as_subclass(torch.Tensor), torch.tensor(expected, dtype=torch.float64)
    )
