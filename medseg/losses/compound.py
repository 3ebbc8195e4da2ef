"""Dice plus cross-entropy, and the losses a recipe can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medseg.losses.cross_entropy import (
    CrossEntropy,
    as_rows,
    log_of_target,
    mean_of_valid,
    region_cross_entropy,
    rows_of_target,
)
from medseg.losses.dice import Dice, label_dice, region_dice

Loss = Callable[..., Tensor]
"""(logits, target, valid) -> scalar; with samples annotated in part also (..., annotated)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiceCE:
    """Soft Dice plus cross-entropy (labels) or binary cross-entropy (regions), weights 1 and 1.

    The same numbers as `Dice` and `CrossEntropy` added; the log-softmax is taken once.
    """

    batch_dice: bool
    """Whether overlaps are pooled over the batch rather than averaged over its samples."""
    has_regions: bool
    """Whether the logits are regions (sigmoid) rather than labels (softmax)."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, fp32, at least -1.

        Args:
            logits: (B, L, *spatial), any precision.
            target: Labels (B, *spatial) int64, or regions (B, L, *spatial) bool.
            valid: (B, *spatial) bool, False at voxels to be left out; None if all count.
            annotated: (B, L) bool, False where the structure of a logit channel was not
                annotated in a sample; None if all were.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = as_rows(logits)
            target, valid = rows_of_target(target, valid)
            if self.has_regions:
                dice = region_dice(
                    torch.sigmoid(logits), target, valid, annotated, batch_dice=self.batch_dice
                )
                return dice + region_cross_entropy(logits, target, valid, annotated)
            logs = torch.log_softmax(logits, 1)
            log_target = log_of_target(logs, target, annotated)
            dice = label_dice(
                logs.exp(), log_target.exp(), target, valid, annotated, batch_dice=self.batch_dice
            )
            return dice + mean_of_valid(-log_target, valid)


class LossFactory(Protocol):
    """What a name of a loss stands for: called once, gives the loss."""

    def __call__(self, *, batch_dice: bool, has_regions: bool) -> Loss: ...


def _cross_entropy(*, batch_dice: bool, has_regions: bool) -> Loss:
    """Return the cross-entropy, which pools over the batch anyway."""
    return CrossEntropy(has_regions=has_regions)


LOSSES: dict[str, LossFactory] = {"dice_ce": DiceCE, "dice": Dice, "ce": _cross_entropy}
"""Value of `loss.name` in a recipe -> factory."""
