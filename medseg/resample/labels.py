"""Label maps: each voxel takes the label with the largest share, ties decided exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.resample.axis import Index, axis_taps, checked_shape, nearest_index, shrinking_first

Label = TypeVar("Label", bound=np.unsignedinteger[Any])

_CHUNK = 2**15
"""Voxels whose label is decided at once; keeps the working arrays in the cache."""


def resize_labels(
    segmentation: NDArray[Label],
    shape: Sequence[int],
    *,
    separate: int | None = None,
    order: Literal[0, 1] = 1,
    rule: Literal["argmax", "threshold"] = "argmax",
    otherwise: int = 0,
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
        rule: `argmax` as above; `threshold`: the largest of the labels with a share of at least
            half.
        otherwise: Label where `threshold` finds none.

    Returns:
        (*shape) array of the same type; the segmentation itself where it has this shape.

    Raises:
        ValueError: If the shape does not fit the array or the order is another one.

    Source:
        `resize_segmentation` of batchgenerators: `argmax` since 0.25.4, `threshold` before.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, got {order}")
    target = checked_shape(segmentation.shape, shape)
    if segmentation.shape == target:
        return segmentation
    taps = [
        axis_taps(now, length, linear=order == 1 and axis != separate)
        for axis, (now, length) in enumerate(zip(segmentation.shape, target, strict=True))
    ]
    lowest = highest = segmentation
    for axis in shrinking_first(segmentation.shape, target):
        lowest = reduce(np.minimum, [lowest.take(index, axis) for index, _ in taps[axis]])
        highest = reduce(np.maximum, [highest.take(index, axis) for index, _ in taps[axis]])
    result = np.ascontiguousarray(lowest)
    flat, source = result.reshape(-1), np.ascontiguousarray(segmentation).reshape(-1)
    nearest = [nearest_index(now, new) for now, new in zip(segmentation.shape, target, strict=True)]
    mixed = np.flatnonzero(lowest != highest)
    for start in range(0, len(mixed), _CHUNK):
        where = mixed[start : start + _CHUNK]
        points = np.unravel_index(where, target)
        closest = tuple(index[point] for index, point in zip(nearest, points, strict=True))
        corners, shares = _corners(points, segmentation.shape, taps)
        if rule == "threshold":
            flat[where] = _last_half(source[corners], shares, otherwise)
        else:
            flat[where] = _best_labels(source[corners], shares, segmentation[closest])
    return result


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
    totals = _totals(labels, shares)
    is_best = totals == totals.max(axis=0)
    none = np.iinfo(labels.dtype).max
    smallest: NDArray[Label] = np.where(is_best, labels, none).min(axis=0).astype(labels.dtype)
    return np.where((is_best & (labels == nearest)).any(axis=0), nearest, smallest)


def _last_half(labels: NDArray[Label], shares: NDArray[np.int64], otherwise: int) -> NDArray[Label]:
    """Return for each of N points the largest label with at least half of the shares.

    Args:
        labels: (corners, N) label of each corner.
        shares: (corners, N) weight of each corner.
        otherwise: Label where there is none.
    """
    has_half = 2 * _totals(labels, shares) >= shares.sum(axis=0)
    found = np.where(has_half, labels, labels.dtype.type(0)).max(axis=0)
    return np.where(has_half.any(axis=0), found, labels.dtype.type(otherwise))


def _totals(labels: NDArray[Label], shares: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (corners, N): the summed share of each corner's label."""
    totals = shares.copy()
    for a, b in itertools.combinations(range(len(labels)), 2):
        same = labels[a] == labels[b]
        totals[a] += shares[b] * same
        totals[b] += shares[a] * same
    return totals
