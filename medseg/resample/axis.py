"""One axis of a resize: its matrix, the neighbours of each row, the order of several axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Index: TypeAlias = NDArray[np.intp]


def separate_axis(
    spacing_current: Sequence[float],
    spacing_target: Sequence[float],
    threshold: float = 3.0,
    *,
    when: Literal["auto", "always", "never"] = "auto",
) -> int | None:
    """Return the axis so coarse that it is resampled on its own, or None.

    Args:
        spacing_current: Voxel size of the data in mm.
        spacing_target: Voxel size asked for in mm, same axes.
        threshold: Ratio of largest to smallest voxel size above which a grid is anisotropic.
        when: `always`: the coarsest axis of the current grid, however anisotropic; `never`: None.

    Source:
        nnU-Net: the current grid decides if it is anisotropic, else the target; no axis where
        two share the largest voxel size.

    Examples:
        >>> separate_axis((5.0, 0.7, 0.7), (4.0, 1.0, 1.0))
        0
        >>> separate_axis((1.2, 0.7, 0.7), (1.0, 1.0, 1.0), when="always")
        0
    """
    if when == "always":
        return _coarsest(spacing_current)
    for spacing in (spacing_current, spacing_target) if when == "auto" else ():
        if is_anisotropic(spacing, threshold):
            return _coarsest(spacing)
    return None


def is_anisotropic(spacing: Sequence[float], threshold: float = 3.0) -> bool:
    """Return whether the largest voxel size is more than `threshold` times the smallest."""
    return max(spacing) / min(spacing) > threshold


def _coarsest(spacing: Sequence[float]) -> int | None:
    """Return the axis of the largest voxel size; None where two share it."""
    largest = max(spacing)
    coarse = [axis for axis, length in enumerate(spacing) if largest / length == 1]
    return coarse[0] if len(coarse) == 1 else None


def new_shape(
    shape: Sequence[int], spacing: Sequence[float], spacing_target: Sequence[float]
) -> tuple[int, ...]:
    """Return the shape in voxels at another voxel size; every axis keeps at least one voxel.

    Args:
        shape: Current shape in voxels.
        spacing: Current voxel size in mm, same axes.
        spacing_target: Voxel size asked for in mm, same axes.

    Source:
        nnU-Net: spacing / target * length, half to even.

    Examples:
        >>> new_shape((20, 100, 101), (3.0, 1.0, 1.0), (2.0, 1.0, 2.0))
        (30, 100, 50)
    """
    return tuple(
        max(1, round(float(now) / float(target) * int(length)))
        for length, now, target in zip(shape, spacing, spacing_target, strict=True)
    )


@lru_cache(maxsize=16)
def axis_matrix(length_in: int, length_out: int, order: Literal[0, 1, 3]) -> NDArray[np.float64]:
    """Return the matrix that resizes one axis.

    Args:
        length_in: Axis length before, in voxels.
        length_out: Axis length after, in voxels.
        order: Spline order: 0 nearest, 1 linear, 3 cubic.

    Returns:
        (length_out, length_in) read-only array whose rows sum to 1.

    Source:
        `scipy.ndimage.zoom` with `grid_mode=True, mode="nearest"`, as in scikit-image's `resize`.
    """
    from scipy import ndimage  # only where something is resampled: it takes a while to import

    identity = np.eye(length_in)
    zoom = (length_out / length_in, 1)
    matrix: NDArray[np.float64] = ndimage.zoom(
        identity, zoom, order=order, mode="nearest", grid_mode=True
    )
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=256)
def axis_taps(
    length_in: int, length_out: int, *, linear: bool
) -> tuple[tuple[Index, NDArray[np.int64]], ...]:
    """Return (input index, integer weight) of every output voxel of an axis, once or twice."""
    if not linear or length_in == length_out:
        return ((nearest_index(length_in, length_out), np.ones(length_out, dtype=np.int64)),)
    low, high, part = _linear_weights(length_in, length_out)
    return ((low, 2 * length_out - part), (high, part))


def _linear_weights(length_in: int, length_out: int) -> tuple[Index, Index, NDArray[np.int64]]:
    """Return the neighbours (low, high) of every output voxel and high's weight x 2 length_out."""
    position = length_in * (2 * np.arange(length_out, dtype=np.int64) + 1) - length_out
    position = np.clip(position, 0, 2 * length_out * (length_in - 1))
    low, part = np.divmod(position, 2 * length_out)
    high = np.minimum(low + 1, length_in - 1)
    return low.astype(np.intp), high.astype(np.intp), part


@lru_cache(maxsize=256)
def nearest_index(length_in: int, length_out: int) -> Index:
    """Return the input index nearest to every output voxel of an axis."""
    from scipy import ndimage

    positions = np.arange(length_in, dtype=np.float64)
    zoom = length_out / length_in
    nearest = ndimage.zoom(positions, zoom, order=0, mode="nearest", grid_mode=True)
    return np.asarray(nearest, dtype=np.intp)


def shrinking_first(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    """Return the axes that change: the most shrinking first, so that the least work follows."""
    changing = [axis for axis in range(len(shape)) if shape[axis] != target[axis]]
    return sorted(changing, key=lambda axis: (target[axis] / shape[axis], -axis))


def checked_shape(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    result = tuple(int(length) for length in target)
    if len(result) != len(shape) or min((*result, *shape)) < 1:
        raise ValueError(
            f"cannot resize an array of spatial shape {tuple(shape)} to {result}; "
            f"expected {len(shape)} lengths of at least 1"
        )
    return result
