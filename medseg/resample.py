"""Resampling of images, segmentations and logits: one small matrix per axis.

An axis-aligned resize with splines is linear and separable. The matrix of one axis is what the
reference (`scipy.ndimage.zoom` on half-pixel centres, edges repeated) makes of the identity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Index: TypeAlias = NDArray[np.intp]
Label = TypeVar("Label", bound=np.unsignedinteger[Any])

_BAND_ROWS = 32
"""Output rows that share one window of input columns; small windows save products of zeros."""
_NEGLIGIBLE = 1e-7
"""Weights below this are left out of a band; a row of weights sums to 1."""
_CHUNK = 2**15
"""Voxels whose label is decided at once; keeps the working arrays in the cache."""


def separate_axis(
    spacing_current: Sequence[float], spacing_target: Sequence[float], threshold: float = 3.0
) -> int | None:
    """Return the axis so coarse that it is resampled on its own, or None.

    Args:
        spacing_current: Voxel size of the data in mm.
        spacing_target: Voxel size asked for in mm, same axes.
        threshold: Ratio of largest to smallest voxel size above which a grid is anisotropic.

    Source:
        nnU-Net: the current grid decides if it is anisotropic, else the target; no axis where
        two share the largest voxel size.

    Examples:
        >>> separate_axis((5.0, 0.7, 0.7), (4.0, 1.0, 1.0))
        0
    """
    for spacing in (spacing_current, spacing_target):
        largest = max(spacing)
        if largest / min(spacing) > threshold:
            coarse = [axis for axis, length in enumerate(spacing) if largest / length == 1]
            return coarse[0] if len(coarse) == 1 else None
    return None


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
    target = _checked_shape(array.shape[1:], shape)
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
        array = array.take(_nearest(array.shape[separate], shape[separate]), separate)
    across = tuple(axis for axis in range(array.ndim) if axis != separate)
    lowest = array.min(axis=across, keepdims=True)
    highest = array.max(axis=across, keepdims=True)
    axes = [axis for axis in _shrinking_first(array.shape, shape) if axis != separate]
    fits = separate is None or change <= 0
    for axis in axes:
        into = result if fits and axis == axes[-1] else None
        array = _multiply(array, shape[axis], axis, order, into)
    if fits or separate is None:
        np.clip(array, lowest, highest, out=result)
        return
    array = np.clip(array, lowest, highest)
    array.take(_nearest(array.shape[separate], shape[separate]), separate, result, "clip")


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


def resize_labels(
    segmentation: NDArray[Label],
    shape: Sequence[int],
    *,
    separate: int | None = None,
    order: Literal[0, 1] = 1,
) -> NDArray[Label]:
    """Resize a segmentation: each voxel takes the label whose linear indicator is largest there.

    An equal share goes to the label of the nearest voxel if that is among the best, otherwise to
    the smallest of them. Shares are compared as integers, so ties are exact whatever the shapes.
    Only the 2^d voxels around a point have a share in it, so the cost does not depend on the
    number of labels: where they agree nothing is computed.

    Args:
        segmentation: (*spatial) unsigned integers.
        shape: Spatial shape asked for, in voxels.
        separate: Axis along which the nearest slice is taken.
        order: 1, or 0 for the nearest voxel's label on all axes.

    Returns:
        (*shape) array of the same type; the segmentation itself where it has this shape.

    Raises:
        ValueError: If the shape does not fit the array or the order is another one.

    Source:
        `resize_segmentation` of batchgenerators 0.25.4 and later.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, got {order}")
    target = _checked_shape(segmentation.shape, shape)
    if segmentation.shape == target:
        return segmentation
    taps = [
        _taps(now, length, linear=order == 1 and axis != separate)
        for axis, (now, length) in enumerate(zip(segmentation.shape, target, strict=True))
    ]
    lowest = highest = segmentation
    for axis in _shrinking_first(segmentation.shape, target):
        lowest = reduce(np.minimum, [lowest.take(index, axis) for index, _ in taps[axis]])
        highest = reduce(np.maximum, [highest.take(index, axis) for index, _ in taps[axis]])
    result = np.ascontiguousarray(lowest)
    flat, source = result.reshape(-1), np.ascontiguousarray(segmentation).reshape(-1)
    nearest = [_nearest(now, new) for now, new in zip(segmentation.shape, target, strict=True)]
    mixed = np.flatnonzero(lowest != highest)
    for start in range(0, len(mixed), _CHUNK):
        where = mixed[start : start + _CHUNK]
        points = np.unravel_index(where, target)
        closest = tuple(index[point] for index, point in zip(nearest, points, strict=True))
        corners, shares = _corners(points, segmentation.shape, taps)
        flat[where] = _best_labels(source[corners], shares, segmentation[closest])
    return result


@lru_cache(maxsize=256)
def _taps(
    length_in: int, length_out: int, *, linear: bool
) -> tuple[tuple[Index, NDArray[np.int64]], ...]:
    """Return (input index, integer weight) of every output voxel of an axis, once or twice."""
    if not linear or length_in == length_out:
        return ((_nearest(length_in, length_out), np.ones(length_out, dtype=np.int64)),)
    low, high, part = _linear_weights(length_in, length_out)
    return ((low, 2 * length_out - part), (high, part))


def _linear_weights(length_in: int, length_out: int) -> tuple[Index, Index, NDArray[np.int64]]:
    """Return the neighbours (low, high) of every output voxel and high's weight x 2 length_out."""
    position = length_in * (2 * np.arange(length_out, dtype=np.int64) + 1) - length_out
    position = np.clip(position, 0, 2 * length_out * (length_in - 1))
    low, part = np.divmod(position, 2 * length_out)
    high = np.minimum(low + 1, length_in - 1)
    return low.astype(np.intp), high.astype(np.intp), part


def _corners(
    points: tuple[Index, ...],
    shape: tuple[int, ...],
    taps: list[tuple[tuple[Index, NDArray[np.int64]], ...]],
) -> tuple[Index, NDArray[np.int64]]:
    """Return the flat input indices around each point and their integer weights, both (2^d, N)."""
    corners: list[tuple[Any, Any]] = [(0, 1)]
    for point, length, options in zip(points, shape, taps, strict=True):
        chosen = [(index[point], weight[point]) for index, weight in options]
        corners = [
            (flat * length + index, share * weight)
            for (flat, share), (index, weight) in itertools.product(corners, chosen)
        ]
    return np.stack([flat for flat, _ in corners]), np.stack([share for _, share in corners])


def _best_labels(
    labels: NDArray[Label], shares: NDArray[np.int64], nearest: NDArray[Label]
) -> NDArray[Label]:
    """Return for each of N points the label with the largest summed share.

    Args:
        labels: (corners, N) label of each corner.
        shares: (corners, N) weight of each corner.
        nearest: (N) label of the nearest input voxel, which wins ties it is part of.
    """
    totals = shares.copy()
    for a, b in itertools.combinations(range(len(labels)), 2):
        same = labels[a] == labels[b]
        totals[a] += shares[b] * same
        totals[b] += shares[a] * same
    is_best = totals == totals.max(axis=0)
    none = np.iinfo(labels.dtype).max
    smallest: NDArray[Label] = np.where(is_best, labels, none).min(axis=0).astype(labels.dtype)
    return np.where((is_best & (labels == nearest)).any(axis=0), nearest, smallest)


def resize_slab(
    logits: torch.Tensor,
    shape: Sequence[int],
    axis: int,
    start: int,
    stop: int,
    *,
    separate: int | None = None,
) -> torch.Tensor:
    """Return rows `start` to `stop` along one axis of logits resized linearly to `shape`.

    Rows do not depend on how the axis is cut: every value comes of the same rounded operations.

    Args:
        logits: (L, *spatial) float32, on any device.
        shape: Full spatial shape asked for, in voxels.
        axis: Spatial axis that is cut.
        start: First row of the slab.
        stop: End of the slab, exclusive.
        separate: Axis along which the nearest slice is taken.

    Returns:
        (L, *slab) tensor, `shape` but for `stop - start` rows along `axis`.

    Raises:
        ValueError: If the shape or the rows do not fit.
    """
    import torch

    spatial = tuple(logits.shape[1:])
    target = _checked_shape(spatial, shape)
    if not 0 <= start < stop <= target[axis]:
        raise ValueError(f"rows {start} to {stop} are not within the {target[axis]} of axis {axis}")
    slab = [stop - start if d == axis else length for d, length in enumerate(target)]
    steps: list[_Step] = []
    for d in [axis, *(d for d in _shrinking_first(spatial, target) if d != axis)]:
        rows = slice(start, stop) if d == axis else slice(None)
        view = [-1 if other == d else 1 for other in range(len(spatial))]
        taps = [
            (
                torch.from_numpy(index[rows].copy()).to(logits.device),
                torch.from_numpy(weight[rows] / (2 * target[d])).to(logits).reshape(view),
            )
            for index, weight in _taps(spatial[d], target[d], linear=d != separate)
        ]
        steps.append((d, taps))
    result = logits.new_empty((logits.shape[0], *slab))
    for source, destination in zip(logits, result, strict=True):
        for d, taps in steps[:-1]:
            source = _blend(source, d, taps)
        _blend(source, *steps[-1], out=destination)
    return result


_Step: TypeAlias = "tuple[int, list[tuple[torch.Tensor, torch.Tensor]]]"


def _blend(
    values: torch.Tensor,
    axis: int,
    taps: list[tuple[torch.Tensor, torch.Tensor]],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gather along one axis and add up with weights; products and sums round separately."""
    import torch

    low = torch.index_select(values, axis, taps[0][0], out=out)
    if len(taps) == 1:
        return low
    high = values.index_select(axis, taps[1][0])
    return low.mul_(taps[0][1]).add_(high.mul_(taps[1][1]))


@lru_cache(maxsize=256)
def _nearest(length_in: int, length_out: int) -> Index:
    """Return the input index nearest to every output voxel of an axis."""
    from scipy import ndimage

    positions = np.arange(length_in, dtype=np.float64)
    zoom = length_out / length_in
    nearest = ndimage.zoom(positions, zoom, order=0, mode="nearest", grid_mode=True)
    return np.asarray(nearest, dtype=np.intp)


def _shrinking_first(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    """Return the axes that change: the most shrinking first, so that the least work follows."""
    changing = [axis for axis in range(len(shape)) if shape[axis] != target[axis]]
    return sorted(changing, key=lambda axis: (target[axis] / shape[axis], -axis))


def _checked_shape(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    result = tuple(int(length) for length in target)
    if len(result) != len(shape) or min((*result, *shape)) < 1:
        raise ValueError(
            f"cannot resize an array of spatial shape {tuple(shape)} to {result}; "
            f"expected {len(shape)} lengths of at least 1"
        )
    return result
