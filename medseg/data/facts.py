"""Plain facts of a case for the quality control of predictions, and their spread over a dataset.

The same functions measure the training cases and, later, a new image and its prediction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.geometry import canonical_axes
from medseg.schema.fingerprint import CaseFingerprint, ChannelIntensities
from medseg.schema.training_cases import ChannelSpread, Spread, StructureSpread, TrainingCases
from medseg.values import value_counts

_DIGITS = 6
_LATTICE = 32
"""Largest number of lattice points along an axis."""
_PERCENTS = (0.5, 50.0, 99.5)
_SPREAD = (0.0, 5.0, 50.0, 95.0, 100.0)


def intensities(
    channels: npt.NDArray[np.float32], affine: npt.ArrayLike
) -> tuple[ChannelIntensities, ...]:
    """Measure each channel where it is finite and not zero, on a lattice of voxels.

    The same image gives the same result in each of the 48 ways of storing it. A channel without
    such a voxel on the lattice gives zeros.

    Args:
        channels: (C, I, J, K), as read.
        affine: (4, 4) voxel index to RAS+ mm.
    """
    axes, flips = canonical_axes(affine)
    view = channels.transpose(0, *(1 + axis for axis in axes))
    view = np.flip(view, tuple(1 + d for d, flip in enumerate(flips) if flip))
    steps = (slice(None, None, -(-length // _LATTICE)) for length in view.shape[1:])
    return tuple(_measured(channel) for channel in view[(slice(None), *steps)])


def _measured(points: npt.NDArray[np.float32]) -> ChannelIntensities:
    values = points[(points != 0) & np.isfinite(points)]
    if not len(values):
        values = np.zeros(1, np.float32)
    low, median, high = np.percentile(values.astype(np.float64), _PERCENTS).tolist()
    return ChannelIntensities(
        percentile_00_5=rounded(low), median=rounded(median), percentile_99_5=rounded(high)
    )


def voxel_ml(affine: npt.ArrayLike) -> float:
    """Return the volume of a voxel in ml.

    Args:
        affine: (4, 4) voxel index to RAS+ mm.

    Examples:
        >>> round(voxel_ml(np.diag([-2.0, 5.0, 10.0, 1.0])), 9)
        0.1
    """
    return abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000


def border_counts(
    segmentation: npt.NDArray[np.integer[Any]], foreground: Collection[int]
) -> dict[tuple[int, bool], int]:
    """Return how many voxels of the foreground lie in each outermost plane.

    Args:
        segmentation: (I, J, K) label map.
        foreground: Its values that are foreground.

    Returns:
        (axis, whether it is the last plane) -> voxels; one on an edge counts for the first axis.
    """
    inner, counts = segmentation, {}
    for axis, length in enumerate(segmentation.shape):
        if length == 1:
            continue
        before: tuple[Any, ...] = (slice(None),) * axis
        counts[axis, False] = count_values(inner[(*before, slice(0, 1))], foreground)
        counts[axis, True] = count_values(inner[(*before, slice(-1, None))], foreground)
        inner = inner[(*before, slice(1, -1))]
    return counts


def count_values(array: npt.NDArray[np.integer[Any]], wanted: Collection[int]) -> int:
    """Return how many voxels hold one of some values."""
    values, counts = value_counts(array)
    return sum(n for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v in wanted)


def summarise(cases: Sequence[CaseFingerprint]) -> TrainingCases | None:
    """Put the facts of all cases of a dataset together.

    Args:
        cases: Those of its fingerprint. Those without facts, of earlier versions, are left out.

    Returns:
        Their spread; None if no case has facts.
    """
    known = [case for case in cases if case.intensities]
    if not known:
        return None
    i, j, k = (_spread([case.spacing[axis] for case in known]) for axis in range(3))
    names = dict.fromkeys(name for case in known for name in case.volumes_ml)
    shares = [case.border_share for case in known if case.border_share is not None]
    return TrainingCases(
        num_cases=len(known),
        spacing=(i, j, k),
        channels=tuple(
            _channel(channel) for channel in zip(*(c.intensities for c in known), strict=True)
        ),
        structures={name: _structure(name, known) for name in names},
        border_share=_spread(shares) if shares else None,
    )


def _channel(cases: Sequence[ChannelIntensities]) -> ChannelSpread:
    return ChannelSpread(
        percentile_00_5=_spread([case.percentile_00_5 for case in cases]),
        median=_spread([case.median for case in cases]),
        percentile_99_5=_spread([case.percentile_99_5 for case in cases]),
    )


def _structure(name: str, cases: Sequence[CaseFingerprint]) -> StructureSpread:
    volumes = [case.volumes_ml[name] for case in cases if name in case.volumes_ml]
    present = [volume for volume in volumes if volume > 0]
    return StructureSpread(
        num_annotated=len(volumes),
        num_present=len(present),
        volume_ml=_spread(present) if present else None,
    )


def _spread(values: Sequence[float]) -> Spread:
    low, five, median, ninety_five, high = np.percentile(values, _SPREAD).tolist()
    return Spread(
        min=rounded(low),
        percentile_05=rounded(five),
        median=rounded(median),
        percentile_95=rounded(ninety_five),
        max=rounded(high),
    )


def rounded(value: float) -> float:
    """Return a number with the digits that are kept of a fact."""
    return float(f"{value:.{_DIGITS}g}")
