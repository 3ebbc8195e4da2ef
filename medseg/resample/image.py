"""Images: splines, as products with the bands of one matrix per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.resample.axis import axis_matrix, checked_shape, nearest_index, shrinking_first

_BAND_ROWS = 32
"""Output rows that share one window of input columns; small windows save products of zeros."""
_NEGLIGIBLE = 1e-7
"""Weights below this are left out of a band; a row of weights sums to 1."""


def resize(
    array: NDArray[np.float32],
    shape: Sequence[int],
    *,
    order: Literal[1, 3] = 3,
    separate: int | None = None,
) -> NDArray[np.float32]:
    """Resize every channel of an image, clipped to the range it had.

    Args:
        array: (C, *spatial) float32, finite.
        shape: Spatial shape asked for, in voxels.
        order: Spline order, 1 or 3.
        separate: Spatial axis resampled on its own: every slice across it is resized and clipped
            to the slice's range, then the nearest slices are taken.

    Returns:
        (C, *shape) float32; the array itself where it already has this shape.

    Raises:
        ValueError: If the shape does not fit the array or the order is another one.

    Source:
        scikit-image `resize(mode="edge", anti_aliasing=False, clip=True)`; nnU-Net's separate axis.
    """
    if order not in (1, 3):
        raise ValueError(f"order must be 1 or 3, got {order}")
    array = np.asarray(array, dtype=np.float32)
    target = checked_shape(array.shape[1:], shape)
    if array.shape[1:] == target:
        return array
    result = np.empty((array.shape[0], *target), dtype=np.float32)
    for source, destination in zip(array, result, strict=True):
        _resize_channel(source, destination, order, separate)
    return result


def _resize_channel(
    array: NDArray[np.float32],
    result: NDArray[np.float32],
    order: Literal[1, 3],
    separate: int | None,
) -> None:
    """Fill `result` (*shape) from one channel; lost slices are lost first, gained ones last."""
    shape = result.shape
    change = 0 if separate is None else shape[separate] - array.shape[separate]
    if separate is not None and change < 0:
        array = array.take(nearest_index(array.shape[separate], shape[separate]), separate)
    across = tuple(axis for axis in range(array.ndim) if axis != separate)
    lowest = array.min(axis=across, keepdims=True)
    highest = array.max(axis=across, keepdims=True)
    axes = [axis for axis in shrinking_first(array.shape, shape) if axis != separate]
    fits = separate is None or change <= 0
    for axis in axes:
        into = result if fits and axis == axes[-1] else None
        array = _multiply(array, shape[axis], axis, order, into)
    if fits or separate is None:
        np.clip(array, lowest, highest, out=result)
        return
    array = np.clip(array, lowest, highest)
    array.take(nearest_index(array.shape[separate], shape[separate]), separate, result, "clip")


def _multiply(
    array: NDArray[np.float32],
    length: int,
    axis: int,
    order: Literal[1, 3],
    result: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Resize one axis by products with the bands of its matrix, into `result` if given."""
    before, now, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
    if result is None:
        result = np.empty((*before, length, *after), dtype=np.float32)
    if math.prod(after) == 1:
        source, destination = array.reshape(-1, now), result.reshape(-1, length)
        for rows, columns, band in _bands(now, length, order):
            np.matmul(source[:, columns], band.T, out=destination[:, rows])
        return result
    outer, inner = math.prod(before), math.prod(after)
    stack, products = array.reshape(outer, now, inner), result.reshape(outer, length, inner)
    for rows, columns, band in _bands(now, length, order):
        np.matmul(band, stack[:, columns], out=products[:, rows])
    return result


@lru_cache(maxsize=256)
def _bands(
    length_in: int, length_out: int, order: Literal[1, 3]
) -> tuple[tuple[slice, slice, NDArray[np.float32]], ...]:
    """Return (output rows, input columns, weights) blocks that hold all but negligible weights."""
    matrix = axis_matrix(length_in, length_out, order)
    bands = []
    for start in range(0, length_out, _BAND_ROWS):
        rows = slice(start, min(start + _BAND_ROWS, length_out))
        used = np.flatnonzero((np.abs(matrix[rows]) > _NEGLIGIBLE).any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((rows, columns, np.ascontiguousarray(matrix[rows, columns], np.float32)))
    return tuple(bands)
