"""Every loss against slow sums over one-hot volumes, in labels and in regions mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg.losses.compound import LOSSES, Loss
from medseg.losses.dice import sum_by_label

SHAPE = (3, 4, 5, 6)
"""Batch and space."""
LOGITS = 3


def logits() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(SHAPE[0], LOGITS, *SHAPE[1:], generator=generator, dtype=torch.float64)
    values[1] *= 4
    return values


def labels() -> Tensor:
    """Return labels whose shares differ between samples; sample 2 has no label 2."""
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(SHAPE, generator=generator)
    found = (uniform > 0.5).long() + (uniform > 0.9).long()
    found[2] = found[2].clamp_max(1)
    return found


def regions() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    chance = torch.tensor([0.5, 0.2, 0.05]).reshape(1, 3, 1, 1, 1)
    return torch.rand(SHAPE[0], LOGITS, *SHAPE[1:], generator=generator) < chance


def mask() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(SHAPE, generator=generator) > 0.3


def slow_dice(
    found: Tensor, target: Tensor, valid: Tensor | None, *, batch_dice: bool, has_regions: bool
) -> float:
    """Return the loss by a walk over samples and classes, one sum each."""
    chances = torch.sigmoid(found) if has_regions else torch.softmax(found, 1)
    keep = torch.ones(SHAPE, dtype=torch.bool) if valid is None else valid
    groups = [list(range(SHAPE[0]))] if batch_dice else [[sample] for sample in range(SHAPE[0])]
    scores = []
    for group in groups:
        for channel in range(0 if has_regions else 1, LOGITS):
            overlap = predicted = present = 0.0
            for sample in group:
                truth = target[sample, channel] if has_regions else target[sample] == channel
                chance = chances[sample, channel][keep[sample]]
                overlap += float(chance[truth[keep[sample]]].sum())
                predicted += float(chance.sum())
                present += float(truth[keep[sample]].sum())
            scores.append((2 * overlap + 1e-5) / (predicted + present + 1e-5))
    return -sum(scores) / len(scores)


def slow_ce(found: Tensor, target: Tensor, valid: Tensor | None, *, has_regions: bool) -> float:
    """Return the mean over valid voxels of -log(chance of the truth), over regions too."""
    keep = torch.ones(SHAPE, dtype=torch.bool) if valid is None else valid
    terms = []
    for sample in range(SHAPE[0]):
        for place in keep[sample].nonzero().tolist():
            column = found[(sample, slice(None), *place)]
            if has_regions:
                truth = target[(sample, slice(None), *place)]
                right = torch.where(truth, torch.sigmoid(column), torch.sigmoid(-column))
                terms.append(float(-right.log().mean()))
            else:
                chance = torch.softmax(column, 0)
                terms.append(float(-chance[target[(sample, *place)]].log()))
    return sum(terms) / max(len(terms), 1)


SLOW = {
    "dice": lambda *given, batch_dice, has_regions: slow_dice(
        *given, batch_dice=batch_dice, has_regions=has_regions
    ),
    "ce": lambda *given, batch_dice, has_regions: slow_ce(*given, has_regions=has_regions),
    "dice_ce": lambda *given, batch_dice, has_regions: (
        slow_dice(*given, batch_dice=batch_dice, has_regions=has_regions)
        + slow_ce(*given, has_regions=has_regions)
    ),
}


class LossContract:
    """What every named loss must do; sub-classes name it."""

    name: str
    golden: dict[bool, float]
    """`has_regions` -> loss of batch Dice without mask, by nnU-Net 2.8.1."""

    def loss(self, *, batch_dice: bool = True, has_regions: bool = False) -> Loss:
        return LOSSES[self.name](batch_dice=batch_dice, has_regions=has_regions)

    def target(self, has_regions: bool) -> Tensor:
        return regions() if has_regions else labels()

    @pytest.mark.parametrize("has_regions", [False, True])
    @pytest.mark.parametrize("batch_dice", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_the_slow_sums(self, has_regions: bool, batch_dice: bool, masked: bool) -> None:
        options = {"batch_dice": batch_dice, "has_regions": has_regions}
        given = (logits(), self.target(has_regions), mask() if masked else None)
        expected = SLOW[self.name](*given, **options)
        assert float(self.loss(**options)(*given)) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.golden
    @pytest.mark.parametrize("has_regions", [False, True])
    def test_is_nnunets(self, has_regions: bool) -> None:
        found = self.loss(has_regions=has_regions)(logits(), self.target(has_regions), None)
        assert float(found) == pytest.approx(self.golden[has_regions], rel=1e-6)

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_gradient_is_the_numerical_one(self, has_regions: bool) -> None:
        target, valid = self.target(has_regions), mask()
        corner = (slice(0, 2), Ellipsis, slice(0, 2), slice(0, 3))
        loss = self.loss(batch_dice=False, has_regions=has_regions)
        values = logits()[corner].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda given: loss(given, target[corner], valid[corner]), (values,)
        )

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_masked_voxels_count_for_nothing(self, has_regions: bool) -> None:
        target, valid = self.target(has_regions), mask()
        loss = self.loss(has_regions=has_regions)
        values = logits().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(values, target, valid), values)
        outside = (~valid).unsqueeze(1).expand_as(gradient)
        assert gradient[outside].abs().max() == 0
        changed = torch.where(outside, -3 * logits() + 1, logits())
        assert float(loss(changed, target, valid)) == pytest.approx(
            float(loss(logits(), target, valid)), rel=1e-12
        )

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_full_mask_is_no_mask(self, has_regions: bool) -> None:
        target = self.target(has_regions)
        loss = self.loss(has_regions=has_regions)
        full = torch.ones(SHAPE, dtype=torch.bool)
        assert float(loss(logits(), target, full)) == pytest.approx(
            float(loss(logits(), target, None)), rel=1e-12
        )

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_empty_mask_gives_a_finite_loss_and_no_gradient(self, has_regions: bool) -> None:
        values = logits().requires_grad_()
        empty = torch.zeros(SHAPE, dtype=torch.bool)
        loss = self.loss(has_regions=has_regions)(values, self.target(has_regions), empty)
        (gradient,) = torch.autograd.grad(loss, values)
        assert torch.isfinite(loss)
        assert gradient.abs().max() == 0

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_low_precision_logits_are_computed_in_fp32(self, has_regions: bool) -> None:
        coarse = logits().to(torch.bfloat16)
        target = self.target(has_regions)
        loss = self.loss(has_regions=has_regions)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(coarse, target, None)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(coarse.float(), target, None), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_memory_layout_does_not_matter(self, has_regions: bool) -> None:
        target = self.target(has_regions)
        loss = self.loss(has_regions=has_regions)
        turned = logits().contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(loss(turned, target, None), loss(logits(), target, None))

    def test_two_dimensions_are_slices(self) -> None:
        loss = self.loss(batch_dice=False)
        flat = loss(logits()[:, :, 0], labels()[:, 0], mask()[:, 0])
        thin = loss(logits()[:, :, :1], labels()[:, :1], mask()[:, :1])
        torch.testing.assert_close(flat, thin)

    @pytest.mark.parametrize("has_regions", [False, True])
    def test_right_logits_are_better_than_wrong_ones(self, has_regions: bool) -> None:
        target = self.target(has_regions)
        wide = target if has_regions else torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
        right = 20 * wide.double() - 10
        loss = self.loss(has_regions=has_regions)
        best = float(loss(right, target, None))
        floor = {"dice": -1.0, "ce": 0.0, "dice_ce": -1.0}[self.name]
        assert best == pytest.approx(floor, abs=0.01)
        assert float(loss(-right, target, None)) > best + 0.5


class TestDice(LossContract):
    name = "dice"
    golden = {False: -0.23863475, True: -0.28810966}  # noqa: RUF012


class TestCrossEntropy(LossContract):
    name = "ce"
    golden = {False: 2.01022932, True: 1.14334154}  # noqa: RUF012


class TestDiceCE(LossContract):
    name = "dice_ce"
    golden = {False: 1.77159457, True: 0.855231881}  # noqa: RUF012


def test_every_named_loss_is_under_the_contract() -> None:
    assert {each.name for each in LossContract.__subclasses__()} == set(LOSSES)


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
