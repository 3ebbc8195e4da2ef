"""Terms of a loss that are made of overlaps: the soft Dice, and the Tversky index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.losses.sums import Sums, quotient
from medseg.losses.voxels import Voxels

SMOOTH = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice:
    """Minus the mean soft Dice of the foreground labels, or of the regions; between -1 and 0.

    Where samples are annotated in part, the mean goes over what was annotated.

    Source:
        Behaviour of nnU-Net v2's memory-efficient soft Dice loss with smooth 1e-5: labels
        without the background, regions all of them; numerator and denominator are both smoothed.
        Squared denominator: V-Net (Milletari et al. 2016).
    """

    batch_dice: bool
    """Whether overlaps are pooled over the batch rather than averaged over its samples."""
    squared: bool = False
    """Whether the predicted size is a sum of squared chances."""
    smooth: float = SMOOTH
    """Added to numerator and denominator, in voxels."""

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        sizes = _sizes(voxels, squared=self.squared)
        return _minus_mean(self._index, sizes, voxels, batch_dice=self.batch_dice)

    def _index(self, overlap: Tensor, predicted: Tensor, present: Tensor) -> Tensor:
        return (2 * overlap + self.smooth) / (predicted + present + self.smooth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tversky:
    """Minus the mean Tversky index, over the same structures as `Dice`; between -1 and 0.

    With alpha = beta = 0.5 it is the Dice, smoothing included.

    Source:
        Salehi et al. 2017: TP / (TP + alpha FP + beta FN).
    """

    batch_dice: bool
    """Whether overlaps are pooled over the batch rather than averaged over its samples."""
    alpha: float = 0.3
    """Weight of false positives."""
    beta: float = 0.7
    """Weight of false negatives."""
    smooth: float = SMOOTH
    """Added to twice the numerator and twice the denominator, in voxels."""

    def __post_init__(self) -> None:
        """Refuse weights that leave nothing to learn."""
        if not self.alpha + self.beta > 0:
            raise ValueError("alpha and beta are both 0: then every prediction is perfect")

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        return _minus_mean(self._index, _sizes(voxels), voxels, batch_dice=self.batch_dice)

    def _index(self, overlap: Tensor, predicted: Tensor, present: Tensor) -> Tensor:
        wrong = self.alpha * (predicted - overlap) + self.beta * (present - overlap)
        return (2 * overlap + self.smooth) / (2 * overlap + 2 * wrong + self.smooth)


def sum_by_label(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Return (B, num_labels): the sum of (B, voxels) values wherever (B, voxels) labels is l."""
    if values.device.type == "cpu":
        return values.new_zeros(len(values), num_labels).scatter_add(1, labels, values)
    # Few bins and many voxels: atomic additions would queue on a GPU, and vary from run to run.
    sums = [torch.where(labels == label, values, 0).sum(1) for label in range(num_labels)]
    return torch.stack(sums, 1)


def _sizes(voxels: Voxels, *, squared: bool = False) -> Sequence[Tensor]:
    """Return overlap, predicted and true size, (B, structures) each, in voxels."""
    chances = voxels.chances
    if voxels.valid is not None:
        chances = chances * voxels.valid.unsqueeze(1)
    predicted = (chances.square() if squared else chances).sum(2)
    if voxels.has_regions:
        return _region_sizes(voxels, chances, predicted)
    return _label_sizes(voxels, predicted)


def _region_sizes(voxels: Voxels, chances: Tensor, predicted: Tensor) -> Sequence[Tensor]:
    target = voxels.target
    if voxels.valid is not None:
        target = target & voxels.valid.unsqueeze(1)
    return (chances * target).sum(2), predicted, target.sum(2, dtype=chances.dtype)


def _label_sizes(voxels: Voxels, predicted: Tensor) -> Sequence[Tensor]:
    """Return the sizes of the foreground labels; no one-hot volume is made."""
    of_target = voxels.log_of_target.exp()
    ones = torch.ones_like(of_target)
    if voxels.valid is not None:
        of_target, ones = of_target * voxels.valid, ones * voxels.valid
    num_labels = predicted.shape[1]
    overlap = sum_by_label(of_target, voxels.target, num_labels)
    present = sum_by_label(ones, voxels.target, num_labels)
    return [each[:, 1:] for each in (overlap, predicted, present)]


def _minus_mean(
    index: Callable[..., Tensor], sizes: Sequence[Tensor], voxels: Voxels, *, batch_dice: bool
) -> Sums:
    """Return the sums of minus the mean of an index of (overlap, predicted, true size).

    What was not annotated in a sample adds to no size; pooled over the batch, a structure counts if
    it was annotated in any sample.
    """
    counted = torch.ones_like(sizes[0])
    if voxels.annotated is not None:
        annotated = voxels.annotated[:, -counted.shape[1] :]
        sizes = [torch.where(annotated, each, 0) for each in sizes]
        counted = counted * annotated
    if not batch_dice:
        return quotient(-(index(*sizes) * counted).sum(), counted.sum())

    def finish(parts: Sequence[Tensor]) -> Tensor:
        is_counted = parts[3] > 0
        mean = torch.where(is_counted, index(*parts[:3]), 0).sum() / is_counted.sum().clamp_min(1)
        return -mean

    return Sums((*(each.sum(0) for each in sizes), counted.sum(0)), finish)
