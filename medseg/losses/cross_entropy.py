"""Cross-entropy over labels, binary cross-entropy over regions.

Samples may be annotated in part. Their background voxels then say "none of the labels that were
drawn", so there the chance of the background is that of the background or of any label that was
not drawn; regions that were not drawn are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy of the valid voxels; binary, and averaged over regions, with regions.

    Source:
        Marginal loss of learning from partially labelled data: classes that were not annotated are
        merged with the background by adding their chances.
        Behaviour of nnU-Net v2, but for regions with an ignore label: there it adds the regions
        up instead of averaging them, so that a mask which hides nothing changes the loss.
    """

    has_regions: bool
    """Whether the logits are regions (sigmoid) rather than labels (softmax)."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None = None,
        annotated: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, fp32, at least 0; 0 where no voxel is valid.

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
                return region_cross_entropy(logits, target, valid, annotated)
            log_target = log_of_target(torch.log_softmax(logits, 1), target, annotated)
            return mean_of_valid(-log_target, valid)


def as_rows(logits: Tensor) -> Tensor:
    """Return (B, L, *spatial) logits as (B, L, voxels), at least fp32.

    Channels-last logits are copied to contiguous memory, where the sums over voxels are faster
    by more than the copy costs.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(exact).flatten(2).contiguous()


def rows_of_target(target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return labels as (B, voxels) or regions as (B, L, voxels), and the mask as (B, voxels)."""
    spatial = 2 if target.dtype == torch.bool else 1
    return target.flatten(spatial), None if valid is None else valid.flatten(1)


def log_of_target(logs: Tensor, target: Tensor, annotated: Tensor | None) -> Tensor:
    """Return the log of the chance of what each voxel is said to be.

    Args:
        logs: (B, L, voxels) log-softmax, background first.
        target: (B, voxels) int64.
        annotated: (B, L) bool or None. The background of a sample stands for every label that was
            not annotated there, too: their chances add up.

    Returns:
        (B, voxels).
    """
    found = logs.gather(1, target.unsqueeze(1)).squeeze(1)
    if annotated is None:
        return found
    apart = annotated.clone()
    apart[:, 0] = False
    merged = logs.masked_fill(apart.unsqueeze(2), -torch.inf).logsumexp(1)
    return torch.where(target == 0, merged, found)


def region_cross_entropy(
    logits: Tensor, target: Tensor, valid: Tensor | None, annotated: Tensor | None
) -> Tensor:
    """Return the mean binary cross-entropy of valid voxels and annotated regions.

    Args:
        logits: (B, L, voxels).
        target: (B, L, voxels) bool.
        valid: (B, voxels) bool or None.
        annotated: (B, L) bool or None; every pair of a voxel and a region that was annotated there
            counts alike.
    """
    each = functional.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), reduction="none"
    )
    if annotated is None:
        return mean_of_valid(each.mean(1), valid)
    counted = (
        annotated.unsqueeze(2) if valid is None else annotated.unsqueeze(2) & valid.unsqueeze(1)
    )
    number = counted.expand_as(each).sum(dtype=each.dtype).clamp_min(1)
    return torch.where(counted, each, 0).sum() / number


def mean_of_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over valid voxels of (B, voxels) values; 0 where no voxel is valid."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum().clamp_min(1)
