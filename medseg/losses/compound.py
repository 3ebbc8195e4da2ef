"""Sums of weighted terms, and the losses a recipe can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.losses.cross_entropy import BinaryCrossEntropy, CrossEntropy, Focal, TopK
from medseg.losses.dice import SMOOTH, Dice, Tversky
from medseg.losses.sums import Sums, settle, weighted
from medseg.losses.voxels import Voxels

Loss = Callable[..., Tensor]
"""(logits, target, valid) -> scalar; with samples annotated in part also (..., annotated)."""

LossFactory = Callable[..., Loss]
"""(*, batch_dice, has_regions, **options) -> loss; what the name of a loss stands for."""

Term = Callable[[Voxels], Sums]
"""A part of a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compound:
    """A weighted sum of terms over the same voxels, in float32 (float64 if given that).

    With several processes it is the loss of all their samples together, in every one of them.
    """

    has_regions: bool
    """Whether the logits are regions (sigmoid) rather than labels (softmax)."""
    terms: tuple[tuple[float, Term], ...]
    """Weights and terms; what has weight 0 is not computed."""

    def __post_init__(self) -> None:
        """Refuse a sum of nothing."""
        if not any(weight for weight, _ in self.terms):
            raise ValueError("every weight is 0: then there is nothing to learn")

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            logits: (B, L, *spatial), any precision.
            target: Labels (B, *spatial) int64, or regions (B, L, *spatial) bool.
            valid: (B, *spatial) bool, False at voxels to be left out; None if all count.
            annotated: (B, L) bool, False where the structure of a logit channel was not
                annotated in a sample; None if all were.
        """
        return settle([self.sums(logits, target, valid, annotated)])[0]

    def sums(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Sums:
        """Return the sums the loss follows from; the same arguments."""
        with torch.autocast(logits.device.type, enabled=False):
            voxels = Voxels.of(logits, target, valid, annotated, has_regions=self.has_regions)
            return weighted([(weight, term(voxels)) for weight, term in self.terms if weight])


def dice(
    *, batch_dice: bool, has_regions: bool, squared: bool = False, smooth: float = SMOOTH
) -> Compound:
    """Soft Dice."""
    term = Dice(batch_dice=batch_dice, squared=squared, smooth=smooth)
    return Compound(has_regions=has_regions, terms=((1.0, term),))


def ce(*, batch_dice: bool, has_regions: bool) -> Compound:
    """Cross-entropy (binary with regions), which pools over the batch in any case."""
    return Compound(has_regions=has_regions, terms=((1.0, CrossEntropy()),))


def dice_ce(
    *,
    batch_dice: bool,
    has_regions: bool,
    squared: bool = False,
    smooth: float = SMOOTH,
    weight_dice: float = 1.0,
    weight_ce: float = 1.0,
) -> Compound:
    """Soft Dice plus cross-entropy (binary with regions)."""
    overlap = Dice(batch_dice=batch_dice, squared=squared, smooth=smooth)
    terms = ((weight_dice, overlap), (weight_ce, CrossEntropy()))
    return Compound(has_regions=has_regions, terms=terms)


def dice_bce(
    *,
    batch_dice: bool,
    has_regions: bool,
    squared: bool = False,
    smooth: float = SMOOTH,
    weight_dice: float = 1.0,
    weight_bce: float = 1.0,
) -> Compound:
    """Soft Dice plus binary cross-entropy: of each region, or of each label against the rest."""
    overlap = Dice(batch_dice=batch_dice, squared=squared, smooth=smooth)
    terms = ((weight_dice, overlap), (weight_bce, BinaryCrossEntropy()))
    return Compound(has_regions=has_regions, terms=terms)


def dice_topk(
    *,
    batch_dice: bool,
    has_regions: bool,
    k: float = 10.0,
    squared: bool = False,
    smooth: float = SMOOTH,
    weight_dice: float = 1.0,
    weight_topk: float = 1.0,
) -> Compound:
    """Soft Dice plus the cross-entropy of the hardest k percent."""
    overlap = Dice(batch_dice=batch_dice, squared=squared, smooth=smooth)
    terms = ((weight_dice, overlap), (weight_topk, TopK(k=k)))
    return Compound(has_regions=has_regions, terms=terms)


def dice_focal(
    *,
    batch_dice: bool,
    has_regions: bool,
    gamma: float = 2.0,
    squared: bool = False,
    smooth: float = SMOOTH,
    weight_dice: float = 1.0,
    weight_focal: float = 1.0,
) -> Compound:
    """Soft Dice plus focal loss."""
    overlap = Dice(batch_dice=batch_dice, squared=squared, smooth=smooth)
    terms = ((weight_dice, overlap), (weight_focal, Focal(gamma=gamma)))
    return Compound(has_regions=has_regions, terms=terms)


def tversky(
    *,
    batch_dice: bool,
    has_regions: bool,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = SMOOTH,
) -> Compound:
    """Tversky index."""
    term = Tversky(batch_dice=batch_dice, alpha=alpha, beta=beta, smooth=smooth)
    return Compound(has_regions=has_regions, terms=((1.0, term),))


def tversky_ce(
    *,
    batch_dice: bool,
    has_regions: bool,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = SMOOTH,
    weight_tversky: float = 1.0,
    weight_ce: float = 1.0,
) -> Compound:
    """Tversky index plus cross-entropy (binary with regions)."""
    overlap = Tversky(batch_dice=batch_dice, alpha=alpha, beta=beta, smooth=smooth)
    terms = ((weight_tversky, overlap), (weight_ce, CrossEntropy()))
    return Compound(has_regions=has_regions, terms=terms)


LOSSES: dict[str, LossFactory] = {
    "dice_ce": dice_ce,
    "dice": dice,
    "ce": ce,
    "dice_bce": dice_bce,
    "dice_topk": dice_topk,
    "dice_focal": dice_focal,
    "tversky": tversky,
    "tversky_ce": tversky_ce,
}
"""Value of `loss.name` in a recipe -> factory."""
