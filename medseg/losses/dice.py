"""The soft Dice loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.losses.cross_entropy import as_rows, rows_of_target

SMOOTH = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice:
    """Minus the mean soft Dice of the foreground labels, or of the regions.

    Where samples are annotated in part, the mean goes over what was annotated.

    Source:
        Behaviour of nnU-Net v2's memory-efficient soft Dice loss with smooth 1e-5: labels
        without the background, regions all of them; numerator and denominator are both smoothed.
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
        """Return the loss, fp32, between -1 and 0.

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
                return region_dice(
                    torch.sigmoid(logits), target, valid, annotated, batch_dice=self.batch_dice
                )
            probabilities = torch.softmax(logits, 1)
            of_target = probabilities.gather(1, target.unsqueeze(1)).squeeze(1)
            return label_dice(
                probabilities, of_target, target, valid, annotated, batch_dice=self.batch_dice
            )


def label_dice(
    probabilities: Tensor,
    of_target: Tensor,
    target: Tensor,
    valid: Tensor | None,
    annotated: Tensor | None = None,
    *,
    batch_dice: bool,
) -> Tensor:
    """Return minus the mean soft Dice over foreground labels; no one-hot volume is made.

    Args:
        probabilities: (B, L, voxels), background first.
        of_target: (B, voxels), the probability of each voxel's own label.
        target: (B, voxels) int64.
        valid: (B, voxels) bool or None.
        annotated: (B, L) bool or None.
        batch_dice: Whether overlaps are pooled over the batch.
    """
    ones = torch.ones_like(of_target)
    if valid is not None:
        probabilities = probabilities * valid.unsqueeze(1)
        of_target, ones = of_target * valid, ones * valid
    num_labels = probabilities.shape[1]
    sums = (
        sum_by_label(of_target, target, num_labels),
        probabilities.sum(2),
        sum_by_label(ones, target, num_labels),
    )
    counted = None if annotated is None else annotated[:, 1:]
    return _minus_mean_dice([each[:, 1:] for each in sums], counted, batch_dice)


def region_dice(
    probabilities: Tensor,
    target: Tensor,
    valid: Tensor | None,
    annotated: Tensor | None = None,
    *,
    batch_dice: bool,
) -> Tensor:
    """Return minus the mean soft Dice over regions.

    Args:
        probabilities: (B, L, voxels).
        target: (B, L, voxels) bool.
        valid: (B, voxels) bool or None.
        annotated: (B, L) bool or None.
        batch_dice: Whether overlaps are pooled over the batch.
    """
    if valid is not None:
        probabilities = probabilities * valid.unsqueeze(1)
        target = target & valid.unsqueeze(1)
    overlap = (probabilities * target).sum(2)
    present = target.sum(2, dtype=probabilities.dtype)
    return _minus_mean_dice([overlap, probabilities.sum(2), present], annotated, batch_dice)


def sum_by_label(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Return (B, num_labels): the sum of (B, voxels) values wherever (B, voxels) labels is l."""
    if values.device.type == "cpu":
        return values.new_zeros(len(values), num_labels).scatter_add(1, labels, values)
    # Few bins and many voxels: atomic additions would queue on a GPU, and vary from run to run.
    sums = [torch.where(labels == label, values, 0).sum(1) for label in range(num_labels)]
    return torch.stack(sums, 1)


def _minus_mean_dice(sums: Sequence[Tensor], annotated: Tensor | None, batch_dice: bool) -> Tensor:
    """Return the loss of overlaps, predicted sizes and true sizes.

    Args:
        sums: Three tensors (B, L), in voxels.
        annotated: (B, L) bool or None. What was not annotated in a sample adds to no sum; with
            batch Dice a structure counts if it was annotated in any sample.
        batch_dice: Whether overlaps are pooled over the batch.
    """
    if annotated is not None:
        sums = [torch.where(annotated, each, 0) for each in sums]
    if batch_dice:
        sums = [each.sum(0) for each in sums]
        annotated = None if annotated is None else annotated.any(0)
    overlap, predicted, present = sums
    dice = (2 * overlap + SMOOTH) / (predicted + present + SMOOTH)
    if annotated is None:
        return -dice.mean()
    return -torch.where(annotated, dice, 0).sum() / annotated.sum().clamp_min(1)
