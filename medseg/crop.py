"""Cropping to the box that holds everything but zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Box: TypeAlias = tuple[tuple[int, int], ...]

_FEW = 0.02
"""Share of zeros up to which holes are found by following the zeros instead of labelling."""

Scalar = TypeVar("Scalar", bound=np.generic)


def nonzero_mask(channels: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where any channel is not zero, enclosed holes filled.

    A hole is a set of zeros connected through faces that does not reach the border of the image.

    Args:
        channels: (C, *spatial) intensities.

    Returns:
        (*spatial) mask.

    Source:
        nnU-Net: channels or-ed, then `scipy.ndimage.binary_fill_holes`; equal to it, but the
        background is labelled once inside the box instead of grown step by step.
    """
    mask: NDArray[np.bool_] = channels[0] != 0
    for channel in channels[1:]:
        mask |= channel != 0
    inside = crop(mask, bounding_box(mask))
    num_zeros = inside.size - np.count_nonzero(inside)
    if num_zeros > _FEW * inside.size:
        inside |= _holes(inside)
    elif num_zeros:
        outside = _reached(inside)
        inside[...] = True
        inside[outside] = False
    return mask


def _reached(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], ...]:
    """Return the voxels of the background that reach a face of the array, spread step by step.

    For scattered zeros, such as soft tissue of exactly 0 HU, where it is several times faster than
    labelling everything.
    """
    left = np.zeros([length + 2 for length in mask.shape], dtype=np.bool_)
    inner = tuple(slice(1, -1) for _ in mask.shape)
    np.logical_not(mask, out=left[inner])
    steps = [s * sign for s in (np.array(left.strides) // left.itemsize) for sign in (1, -1)]
    flat = left.reshape(-1)
    zeros = np.flatnonzero(flat)
    where = np.unravel_index(zeros, left.shape)
    edges = zip(where, mask.shape, strict=True)
    is_edge = np.any([(w == 1) | (w == length) for w, length in edges], axis=0)
    front, reached = zeros[is_edge], []
    while len(front):
        flat[front] = False
        reached.append(front)
        around = np.concatenate([front + step for step in steps])
        front = np.unique(around[flat[around]])
    found = np.unravel_index(np.concatenate([*reached, zeros[:0]]), left.shape)
    return tuple(index - 1 for index in found)


def _holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the components of the background that touch no face of the array."""
    from scipy import ndimage  # takes a while to import, and most images need it not

    components, count = ndimage.label(~mask)
    is_hole = np.ones(count + 1, dtype=np.bool_)
    is_hole[0] = False
    for axis in range(mask.ndim):
        for end in (0, -1):
            is_hole[components.take(end, axis)] = False
    holes: NDArray[np.bool_] = is_hole[components]
    return holes


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the smallest box that holds every true voxel; the whole array if there is none.

    Args:
        mask: (*spatial) mask.

    Returns:
        (start, stop) for every axis, stop exclusive.

    Examples:
        >>> bounding_box(np.array([[False, False, False], [False, True, True]]))
        ((1, 2), (1, 3))
    """
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        used = np.flatnonzero(mask.any(axis=others))
        if not len(used):
            return tuple((0, length) for length in mask.shape)
        box.append((int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def nonzero_box(channels: NDArray[Any]) -> Box:
    """Return the smallest box that holds every voxel that is not zero in any channel.

    The same as `bounding_box(nonzero_mask(channels))`, but only the zeros around the box are
    looked at.

    Args:
        channels: (C, *spatial) intensities.
    """
    box = [(0, length) for length in channels.shape[1:]]
    for axis in range(len(box)):
        start, stop = box[axis]
        while start < stop and not _plane(channels, box, axis, start).any():
            start += 1
        if start == stop:
            return tuple((0, length) for length in channels.shape[1:])
        while not _plane(channels, box, axis, stop - 1).any():
            stop -= 1
        box[axis] = (start, stop)
    return tuple(box)


def _plane(channels: NDArray[Any], box: Box | list[tuple[int, int]], axis: int, at: int) -> Any:
    """Return one plane across an axis, as far as it lies in the box."""
    bounds = [*box[:axis], (at, at + 1), *box[axis + 1 :]]
    return crop(channels, bounds)


def crop(array: NDArray[Scalar], box: Sequence[tuple[int, int]]) -> NDArray[Scalar]:
    """Return a view of the box; it applies to the last axes, leading ones are kept.

    Args:
        array: (..., *spatial).
        box: (start, stop) for every spatial axis.
    """
    index: tuple[Any, ...] = (..., *(slice(start, stop) for start, stop in box))
    view: NDArray[Scalar] = array[index]
    return view
