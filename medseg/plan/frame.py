"""The frame all configurations of a plan share: target voxel size, axis order, median image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medseg.resample import new_shape
from medseg.schema.fingerprint import Fingerprint

PLANNER_AXES = (2, 1, 0)
"""The planner looks at canonical axes in the order K, J, I; ties depend on it."""
ANISOTROPY = 3.0
"""An axis this many times coarser, and shorter, than the others is treated apart."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Target voxel size, axis order and median image; per-axis entries in network order."""

    network_axes: tuple[int, int, int]
    """Network axis d is canonical axis `network_axes[d]`."""
    spacing: tuple[float, float, float]
    """Target voxel size in mm."""
    median_shape: tuple[float, float, float]
    """Median image shape at the target voxel size, in voxels."""
    original_spacing: tuple[float, float, float]
    """Median voxel size of the raw images, in mm."""
    original_shape: tuple[float, float, float]
    """Median shape of the cropped raw images, in voxels."""
    num_cases: int
    """Cases the medians are taken over."""
    fine_axis: int | None
    """Network axis whose target is the 10th percentile instead of the median, if any."""
    is_given: bool
    """Whether the target voxel size was given, not found."""
    is_flat: bool
    """Whether the images are single slices (across network axis 0)."""


def find_frame(fingerprint: Fingerprint, target_spacing: Sequence[float] | None = None) -> Frame:
    """Choose target voxel size and axis order.

    The axis with the coarsest target comes first; of images that are single slices, the axis
    across the slices. The others keep the order K, J, I.

    Args:
        fingerprint: Statistics of the raw data set, at least one case.
        target_spacing: Voxel size in mm on canonical axes (I, J, K) instead of the planner's.

    Source:
        Behaviour of nnU-Net 2.8.1 `determine_fullres_target_spacing` and `determine_transpose`.
        Unlike there, single slices are recognised along any axis, whatever its voxel size.
    """
    axes = list(PLANNER_AXES)
    cases = list(fingerprint.cases.values())
    spacings = np.array([case.spacing for case in cases], dtype=np.float64)[:, axes]
    shapes = np.array([case.shape_cropped for case in cases], dtype=np.float64)[:, axes]
    target, fine_axis = choose_spacing(spacings, shapes)
    if target_spacing is not None:
        target, fine_axis = np.array(target_spacing, dtype=np.float64)[axes], None
    resampled = np.array(
        [
            new_shape(tuple(map(int, shape)), tuple(map(float, spacing)), tuple(map(float, target)))
            for shape, spacing in zip(shapes, spacings, strict=True)
        ]
    )
    flat = _flat_axes(shapes, resampled)
    first = max(flat or range(3), key=lambda axis: target[axis])
    order = [first, *(axis for axis in range(3) if axis != first)]
    a, b, c = (PLANNER_AXES[axis] for axis in order)
    return Frame(
        network_axes=(a, b, c),
        spacing=_ordered(target, order),
        median_shape=_ordered(np.median(resampled, axis=0), order),
        original_spacing=_ordered(np.median(spacings, axis=0), order),
        original_shape=_ordered(np.median(shapes, axis=0), order),
        num_cases=len(cases),
        fine_axis=None if fine_axis is None else order.index(fine_axis),
        is_given=target_spacing is not None,
        is_flat=bool(flat),
    )


def choose_spacing(spacings: Array, shapes: Array) -> tuple[Array, int | None]:
    """Return the target voxel size: the median, on a coarse and short axis the 10th percentile.

    Args:
        spacings: Voxel size of each case in mm, (cases, axes).
        shapes: Shape of each cropped case in voxels, (cases, axes).

    Returns:
        The target in mm, and the axis that got the 10th percentile, if any. That axis never gets
        a finer target than the others have.

    Examples:
        >>> spacings = np.array([[10.0, 1, 1], [5, 1, 1], [10, 1.2, 1]])
        >>> choose_spacing(spacings, np.array([[12, 200, 180]] * 3))
        (array([6., 1., 1.]), 0)
    """
    target = np.percentile(spacings, 50, 0)
    size = np.percentile(shapes, 50, 0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != coarse]
    coarsest_other = max(target[axis] for axis in others)
    is_coarse = target[coarse] > ANISOTROPY * coarsest_other
    is_short = size[coarse] * ANISOTROPY < min(size[axis] for axis in others)
    if not (is_coarse and is_short):
        return target, None
    fine = np.percentile(spacings[:, coarse], 10)
    target[coarse] = fine if fine >= coarsest_other else coarsest_other + 1e-5
    return target, coarse


def _flat_axes(shapes: Array, resampled: Array) -> list[int]:
    """Return the axes across single slices: those of length 1 in the median case.

    If every case is a single slice but not all across one axis, the most frequent axis counts.
    """
    flat = (np.median(shapes, axis=0) == 1) | (np.median(resampled, axis=0) == 1)
    if not flat.any() and (shapes.min(axis=1) == 1).all():
        return [int(np.argmax((shapes == 1).sum(axis=0)))]
    return [int(axis) for axis in np.flatnonzero(flat)]


def _ordered(values: Array, order: list[int]) -> tuple[float, float, float]:
    a, b, c = (float(values[axis]) for axis in order)
    return a, b, c
