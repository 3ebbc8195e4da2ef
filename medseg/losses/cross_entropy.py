"""Cross-entropy over labels, binary cross-entropy over regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy of the valid voxels; binary, and averaged over regions, with regions.

    Source:
        Behaviour of nnU-Net v2, but for regions with an ignore label: there it adds the regions
        up instead of averaging them, so that a mask which hides nothing changes the loss.
    """

    has_regions: bool
    """Whether the logits are regions (sigmoid) rather than labels (softmax)."""

    def __call__(self, logits: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the loss, fp32, at least 0; 0 where no voxel is valid.

        Args:
            logits: (B, L, *spatial), any precision.
            target: Labels (B, *spatial) int64, or regions (B, L, *spatial) bool.
            valid: (B, *spatial) bool, False at voxels to be left out; None if all count.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = as_rows(logits)
            target, valid = rows_of_target(target, valid)
            if self.has_regions:
                return mean_of_valid(binary_cross_entropy(logits, target), valid)
            log_target = torch.log_softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)
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


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over regions, (B, voxels), of (B, L, voxels) logits and regions."""
    each = functional.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), reduction="none"
    )
    return each.mean(1)


def mean_of_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over valid voxels of (B, voxels) values; 0 where no voxel is valid."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum().clamp_min(1)
