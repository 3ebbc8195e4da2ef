"""Resizing as the references do it, operation by operation: slow, for exact mode and for tests.

Sums are taken in double precision and the result has the type of the input, so that it equals
theirs to the last bit on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.resample.axis import checked_shape

Array = NDArray[Any]
_DECIDED = 700
"""Of 1000: a label with a larger share takes a voxel at once."""


def resize_literal(
    array: Array,
    shape: Sequence[int],
    *,
    order: Literal[0, 1, 3],
    separate: int | None = None,
    method: Literal["spline", "interpolate", "none"] = "spline",
) -> Array:
    """Resize every channel of an array.

    Args:
        array: (C, n0, n1, n2) of a floating type.
        shape: Spatial shape asked for, in voxels.
        order: Spline order.
        separate: Spatial axis resampled on its own: every slice across it, then the nearest ones.
        method: `spline` with scipy in float64; `interpolate` linearly with torch in float32.

    Returns:
        (C, *shape) of the type of the input, float32 with `interpolate`; the array itself where
        it has this shape.

    Source:
        scikit-image `resize(mode="edge", anti_aliasing=False, clip=True)` as nnU-Net v1 and v2
        call it, and the resampling of nnU-Net v2 with torch.
    """
    target = checked_shape(array.shape[1:], shape)
    if array.shape[1:] == target or method == "none":
        return array
    if method == "interpolate":
        return _interpolated(np.asarray(array, dtype=np.float32), target, separate)
    result = np.empty((len(array), *target), dtype=array.dtype)
    for channel, out in zip(array, result, strict=True):
        out[...] = _slices(
            channel.astype(np.float64),
            target,
            separate,
            lambda part, size: _zoomed(part, size, order),
        )
    return result


def resize_labels_literal(
    labels: NDArray[Any],
    shape: Sequence[int],
    *,
    order: Literal[0, 1] = 1,
    separate: int | None = None,
    method: Literal["spline", "interpolate", "none"] = "spline",
    rule: Literal["argmax", "threshold"] = "argmax",
    otherwise: int = 0,
) -> NDArray[Any]:
    """Resize a label map.

    Args:
        labels: (n0, n1, n2) unsigned integers.
        shape: Spatial shape asked for, in voxels.
        order: Spline order of the shares.
        separate: Axis along which the nearest slice is taken.
        method: As in `resize_literal`; `interpolate` has a rule of its own: a label with a clear
            majority, else the largest share in float16, ties to the smallest label.
        rule: As in `resize_labels`, with shares in float64, whose rounding decides near ties.
        otherwise: Label where `threshold` finds none.

    Returns:
        (*shape) of the same type.

    Source:
        `resize_segmentation` of batchgenerators (`argmax` since 0.25.4, `threshold` before), and
        the label resampling of nnU-Net v2 with torch.
    """
    target = checked_shape(labels.shape, shape)
    if labels.shape == target or method == "none":
        return labels
    if method == "interpolate":
        return _interpolated_labels(labels, target, separate)

    def resized(part: Array, size: tuple[int, ...]) -> Array:
        return _resized_labels(part, size, order, rule, otherwise)

    return _slices(labels, target, separate, resized)


def nearest_slices(length_in: int, length_out: int) -> NDArray[np.intp]:
    """Return the input slice that each output slice is taken from, as nearest sampling rounds."""
    from scipy import ndimage

    places = float(length_in) / length_out * (np.arange(length_out) + 0.5) - 0.5
    numbers = np.arange(length_in, dtype=np.float64)
    found = ndimage.map_coordinates(numbers, [places], order=0, mode="nearest")
    return np.asarray(found, dtype=np.intp)


def _slices(
    channel: Array,
    shape: tuple[int, ...],
    separate: int | None,
    resized: Callable[[Array, tuple[int, ...]], Array],
) -> Array:
    """Resize one channel whole, or slice by slice with the nearest slices taken afterwards."""
    if separate is None:
        return resized(channel, shape)
    across = shape[:separate] + shape[separate + 1 :]
    parts = np.stack(
        [resized(part, across) for part in np.moveaxis(channel, separate, 0)], separate
    )
    return parts.take(nearest_slices(channel.shape[separate], shape[separate]), separate)


def _zoomed(array: Array, shape: tuple[int, ...], order: int) -> Array:
    from scipy import ndimage

    factors = [1 / (before / after) for before, after in zip(array.shape, shape, strict=True)]
    found = ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
    result: Array = np.clip(found, array.min(), array.max()) if order > 0 else found
    return result


def _interpolated(
    array: NDArray[np.float32], shape: tuple[int, ...], separate: int | None
) -> Array:
    import torch
    from torch.nn import functional

    if separate is None:
        return functional.interpolate(
            torch.from_numpy(np.ascontiguousarray(array))[None], shape, mode="trilinear"
        )[0].numpy()
    across = shape[:separate] + shape[separate + 1 :]
    slices = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, separate + 1, 1)))
    if slices.shape[2:] != across:
        whole = slices.flatten(0, 1)[None]  # torch rounds by the number of channels
        resized = functional.interpolate(whole, across, mode="bilinear")
        slices = resized.view(*slices.shape[:2], *across)
    back = slices.movedim(1, separate + 1)
    if back.shape[1:] != shape:
        back = functional.interpolate(back[None], shape, mode="nearest-exact")[0]
    return back.numpy()


def _resized_labels(
    labels: Array, shape: tuple[int, ...], order: int, rule: str, otherwise: int
) -> Array:
    nearest = _zoomed(labels.astype(np.float64), shape, 0).astype(labels.dtype)
    if order == 0:
        return nearest
    result = np.full(shape, otherwise, dtype=labels.dtype)
    best, nearest_is_best = np.zeros(shape), np.zeros(shape, dtype=bool)
    for label in np.unique(labels):
        share = _zoomed((labels == label).astype(np.float64), shape, order)
        if rule == "threshold":
            result[share >= 0.5] = label
            continue
        is_better = share > best
        result[is_better] = label
        is_nearest = nearest == label
        nearest_is_best &= ~is_better
        nearest_is_best |= is_nearest & (share > 0) & (share >= best)
        best = np.maximum(best, share)
    return np.where(nearest_is_best, nearest, result)


def _interpolated_labels(
    labels: Array, shape: tuple[int, ...], separate: int | None
) -> NDArray[Any]:
    values = np.unique(labels)
    shares = np.stack([
        _interpolated((labels == value).astype(np.float32)[None] * 1000, shape, separate)[0]
        for value in values
    ]).astype(np.float16)  # fmt: skip
    result = values[shares.argmax(axis=0)]
    for value, share in zip(values, shares, strict=True):
        result[share > _DECIDED] = value
    found: NDArray[Any] = result.astype(labels.dtype)
    return found
