"""Terms of a loss that are made of voxels: cross-entropy, the hardest of it, and focal loss.

With regions, each takes the binary cross-entropy of every region instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medseg.losses.hardest import mean_of_hardest
from medseg.losses.sums import Sums, quotient
from medseg.losses.voxels import Voxels

Terms = tuple[Tensor, Tensor | None]
"""Values (B, voxels), or (B, L, voxels) pairs of a voxel and a logit; and which of them count: bool
of a shape that broadcasts to them, None for all."""


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Mean cross-entropy of the valid voxels; binary, and averaged over regions, with regions.

    Every pair of a valid voxel and an annotated region counts alike. 0 where there is none.

    Source:
        Behaviour of nnU-Net v2, but for regions with an ignore label: there it adds the regions
        up instead of averaging them, so that a mask which hides nothing changes the loss.
    """

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        return _mean(cross_entropies(voxels))


@dataclass(frozen=True, slots=True)
class BinaryCrossEntropy:
    """Mean binary cross-entropy of every region, or of each label against the rest."""

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        return _mean(binary_cross_entropies(voxels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Focal:
    """Mean of the cross-entropy times (1 - chance of the truth) ** gamma.

    Source:
        Lin et al. 2017, without their weight of the classes.
    """

    gamma: float = 2.0
    """How fast what is nearly right fades; 0: cross-entropy."""

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        values, counted = cross_entropies(voxels)
        # The least positive number instead of 0 keeps the slope of the power finite.
        wrong = -torch.expm1(-values).clamp_max(-torch.finfo(values.dtype).tiny)
        return _mean((wrong**self.gamma * values, counted))


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Mean of the k percent of the cross-entropy that are largest in the whole batch.

    Of the voxels that count, rounded down, but at least one; with regions, of the pairs of a voxel
    and a region. The batch is that of all processes together.

    Source:
        Behaviour of nnU-Net v2's top-k loss; there k percent are of all voxels, ignored or not.
    """

    k: float = 10.0
    """Percent."""

    def __call__(self, voxels: Voxels) -> Sums:
        """Return the sums of this term."""
        return mean_of_hardest(*cross_entropies(voxels), percent=self.k)


def cross_entropies(voxels: Voxels) -> Terms:
    """Return the cross-entropy of each voxel, or the binary one of each voxel and region."""
    if voxels.has_regions:
        return binary_cross_entropies(voxels)
    return -voxels.log_of_target, voxels.valid


def binary_cross_entropies(voxels: Voxels) -> Terms:
    """Return the binary cross-entropy of each voxel and each region, or label against the rest.

    A background voxel of a sample annotated in part says nothing of the background, nor of the
    labels that were not drawn; a voxel of a label says something of all.
    """
    logits = voxels.logits
    if voxels.has_regions:
        each = functional.binary_cross_entropy_with_logits(
            logits, voxels.target.to(logits.dtype), reduction="none"
        )
        return each, voxels.counted_regions
    target = voxels.target.unsqueeze(1)
    each = (-functional.logsigmoid(-logits)).scatter_add(1, target, -logits.gather(1, target))
    valid = None if voxels.valid is None else voxels.valid.unsqueeze(1)
    if voxels.annotated is None:
        return each, valid
    known = voxels.annotated.clone()
    known[:, 0] = voxels.annotated.all(1)
    counted = known.unsqueeze(2) | (target != 0)
    return each, counted if valid is None else counted & valid


def _mean(terms: Terms) -> Sums:
    """Return the sums of the mean of the values that count; 0 where none does.

    A pair of a voxel and a logit is one of L parts of a voxel, whether or not all of them count:
    one process may have samples that are annotated in part while the others have none.
    """
    values, counted = terms
    num_parts = 1 if values.ndim == 2 else values.shape[1]
    if values.ndim == 3 and (counted is None or counted.shape[1] == 1):
        values, num_parts = values.mean(1), 1
        counted = None if counted is None else counted.squeeze(1)
    if counted is None:
        return quotient(values.sum(), values.new_full((), values.numel()))
    number = counted.expand_as(values).sum(dtype=values.dtype)
    total = torch.where(counted, values, 0).sum()
    return quotient(total / num_parts, number / num_parts)
