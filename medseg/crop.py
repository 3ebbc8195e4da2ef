"""Cropping to the box that holds everything but zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box: TypeAlias = tuple[tuple[int, int], ...]

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
    mask = np.zeros(channels.shape[1:], dtype=np.bool_)
    for channel in channels:
        mask |= channel != 0
    inside = crop(mask, bounding_box(mask))
    if not inside.all():
        inside |= _holes(inside)
    return mask


def _holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the components of the background that touch no face of the array."""
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


def crop(array: NDArray[Scalar], box: Sequence[tuple[int, int]]) -> NDArray[Scalar]:
    """Return a view of the box; it applies to the last axes, leading ones are kept.

    Args:
        array: (..., *spatial).
        box: (start, stop) for every spatial axis.
    """
    index: tuple[Any, ...] = (..., *(slice(start, stop) for start, stop in box))
    view: NDArray[Scalar] = array[index]
    return view
