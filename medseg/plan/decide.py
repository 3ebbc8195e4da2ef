"""All decisions of a plan, before they are written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medseg.errors import PlanError
from medseg.plan.channels import Channel
from medseg.plan.frame import Frame
from medseg.plan.sizing import Budget, Sizing, size_configuration
from medseg.schema.plans import Normalization

SMALL_COVERAGE = 0.25
"""A patch that covers less of the median image calls for a low-resolution stage."""
WORTHWHILE_REDUCTION = 2.0
"""A low-resolution stage must have at least this many times fewer voxels."""
SPACING_STEP = 1.03
"""Factor by which the voxel size of the low-resolution stage grows from trial to trial."""
SPACING_GAP = 2.0
"""Axes finer than the coarsest by more than this factor grow first."""
MAX_TRIALS = 1000
"""Trials of a low-resolution voxel size before giving up (a factor of 1e12)."""
MASK_SHARE = 0.75
"""Where cropping leaves less than this share of the voxels, statistics come from the mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What was decided, and from what."""

    frame: Frame
    """Target voxel size and axis order."""
    budget: Budget
    """What a configuration may cost."""
    sizings: dict[str, Sizing]
    """Configuration name -> patch, network and batch; the cascade is as `3d_fullres`."""
    rejected: Sizing | None
    """A low-resolution stage that is hardly smaller than full resolution, if one was tried."""
    channels: tuple[Channel, ...]
    """How each channel is normalised."""
    masks: tuple[bool, ...]
    """Whether each channel's statistics come from the non-zero mask."""
    kept_share: float
    """Median share of the voxels that cropping to the non-zero box leaves."""

    @property
    def normalization(self) -> tuple[Normalization, ...]:
        """Return the normalisation of each channel."""
        return tuple(channel.scheme for channel in self.channels)

    @property
    def batch_dice(self) -> dict[str, bool]:
        """Return for each configuration whether the Dice loss pools the batch.

        It does in 2D, and at full resolution where a patch shows so little that there is a
        low-resolution stage.
        """
        pooled = {"2d": True, "3d_lowres": False, "3d_fullres": "3d_lowres" in self.sizings}
        return {name: pooled[name] for name in self.sizings}


def decide(
    frame: Frame, budget: Budget, *, channels: Sequence[Channel], kept_share: float
) -> Decisions:
    """Make every decision of a plan.

    Args:
        frame: Target voxel size and axis order.
        budget: What a configuration may cost.
        channels: How each channel is normalised.
        kept_share: Median share of the voxels that cropping to the non-zero box leaves.

    Raises:
        PlanError: If nothing fits the budget.
    """
    sizings, rejected = _size_all(frame, budget)
    masks = tuple(c.scheme == "zscore" and kept_share < MASK_SHARE for c in channels)
    return Decisions(
        frame=frame,
        budget=budget,
        sizings=sizings,
        rejected=rejected,
        channels=tuple(channels),
        masks=masks,
        kept_share=kept_share,
    )


def _size_all(frame: Frame, budget: Budget) -> tuple[dict[str, Sizing], Sizing | None]:
    """Return the configurations, and the low-resolution stage that was tried but rejected."""
    num_voxels = math.prod(frame.median_shape)
    flat = size_configuration(
        frame.spacing[1:], frame.median_shape[1:], budget=budget, num_voxels_case=num_voxels
    )
    if frame.is_flat:
        return {"2d": flat}, None
    full = size_configuration(
        frame.spacing, frame.median_shape, budget=budget, num_voxels_case=num_voxels
    )
    low = _find_low_resolution(full, budget)
    if low is None:
        return {"2d": flat, "3d_fullres": full}, None
    if num_voxels / math.prod(_shape_at(full, low.spacing)) < WORTHWHILE_REDUCTION:
        return {"2d": flat, "3d_fullres": full}, low
    return {"2d": flat, "3d_lowres": low, "3d_fullres": full}, None


def _find_low_resolution(full: Sizing, budget: Budget) -> Sizing | None:
    """Return the finest stage whose patch covers enough of the median image.

    None if full resolution does so itself. Voxels grow first along the axes that are finer than
    the coarsest by more than a factor of 2, then along all.

    Source:
        Behaviour of nnU-Net 2.8.1 `plan_experiment`.
    """
    spacing = np.array(full.spacing)
    patch, num_voxels = full.patch_size, math.prod(full.median_shape)
    low: Sizing | None = None
    for _ in range(MAX_TRIALS):
        if math.prod(patch) / num_voxels >= SMALL_COVERAGE:
            return low
        finer = spacing.max() / spacing > SPACING_GAP
        spacing = np.where(finer if finer.any() else True, spacing * SPACING_STEP, spacing)
        shape = _shape_at(full, spacing)
        num_voxels = math.prod(shape)
        low = size_configuration(
            [float(v) for v in spacing],
            [max(round(length), 1) for length in shape],
            budget=budget,
            num_voxels_case=num_voxels,
        )
        patch = low.patch_size
    raise PlanError(
        f"no low-resolution stage found for a median image of {full.median_shape} voxels at "
        f"{full.spacing} mm; check the voxel sizes, or allow more GPU memory."
    )


def _shape_at(full: Sizing, spacing: Sequence[float] | npt.NDArray[np.float64]) -> list[float]:
    """Return the median shape at another voxel size, in fractions of voxels."""
    return [
        fine / float(coarse) * length
        for fine, coarse, length in zip(full.spacing, spacing, full.median_shape, strict=True)
    ]
