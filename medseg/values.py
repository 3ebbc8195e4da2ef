"""The values of label maps: which there are, how often, and other values in their place.

Label maps are pieces of few distinct values, up to hundreds of millions of voxels: nothing here
sorts them, and nothing is larger than a part of them but the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TABLE_SPAN = 2**16
"""Tables are used for values that span no more than this."""
_CHUNK = 2**16
"""Voxels handled at a time."""

Integers = NDArray[np.integer[Any]]


def value_counts(array: Integers) -> tuple[Integers, NDArray[np.int64]]:
    """Return the distinct values of a label map, ascending, and how many voxels hold each.

    Values are int64, or uint64 where they go beyond that.

    Args:
        array: Any shape, memory order and integer type.

    Examples:
        >>> values, counts = value_counts(np.array([[7, -1], [7, 70000]]))
        >>> values.tolist(), counts.tolist()
        ([-1, 7, 70000], [1, 2, 1])
    """
    if not array.size:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    flat = array.ravel(order="K")
    low, high = int(flat.min()), int(flat.max())
    if high - low >= _TABLE_SPAN:
        return _count_runs(flat)
    counts = np.zeros(high - low + 1, dtype=np.int64)
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(_above(flat[start : start + _CHUNK], low), minlength=len(counts))
    found = np.flatnonzero(counts)
    return np.array([int(place) + low for place in found], _kind(high)), counts[found]


def _above(part: Integers, low: int) -> NDArray[np.intp]:
    """Return how far values are above the lowest, also where they are beyond int64."""
    if part.dtype.kind == "u":
        return (part - part.dtype.type(low)).astype(np.intp)
    return part.astype(np.intp) - low


def _kind(high: int) -> type[np.int64] | type[np.uint64]:
    """Return the type for values up to one."""
    return np.int64 if high <= np.iinfo(np.int64).max else np.uint64


def _count_runs(flat: Integers) -> tuple[Integers, NDArray[np.int64]]:
    """Count values that are far apart, by the runs of equal neighbours."""
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    lengths = np.diff(starts, append=flat.size)
    kind = _kind(int(flat.max()))
    values, places = np.unique(flat[starts].astype(kind), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, places, lengths)
    return values, counts


def distinct_values(array: Integers) -> Integers:
    """Return the values that occur in a label map, ascending.

    Examples:
        >>> distinct_values(np.array([[7, 0], [7, 2]], np.uint8)).tolist()
        [0, 2, 7]
    """
    return value_counts(array)[0]


def places_in(values: Sequence[int], array: Integers, kind: np.dtype[Any]) -> Any:
    """Return where in a list each value of a label map stands.

    Args:
        values: Distinct values, in any order.
        array: Label map of any shape.
        kind: Type of the result, wide enough for every place.

    Returns:
        Array of the same shape and memory order, of type `kind`; None if a value is not listed.

    Examples:
        >>> places_in([9, -5], np.array([[-5, 9, 9]]), np.dtype(np.uint8)).tolist()
        [[1, 0, 0]]
    """
    if not array.size:
        return array.astype(kind)
    places = _finder(values, int(array.min()), int(array.max()))
    result = np.empty_like(array, dtype=kind, subok=False)
    source, target = array.ravel(order="K"), result.ravel(order="K")
    for start in range(0, source.size, _CHUNK):
        part = places(source[start : start + _CHUNK])
        if int(part.max()) == len(values):
            return None
        target[start : start + _CHUNK] = part
    return result


def values_at(values: NDArray[Any], places: Integers) -> Any:
    """Return the values that stand at places of a list.

    Args:
        values: The list.
        places: Array of any shape, entries below the length of the list.

    Returns:
        Array of the shape and memory order of `places` and the type of `values`.
    """
    result = np.empty_like(places, dtype=values.dtype, subok=False)
    source, target = places.ravel(order="K"), result.ravel(order="K")
    for start in range(0, source.size, _CHUNK):
        target[start : start + _CHUNK] = values[source[start : start + _CHUNK]]
    return result


def _finder(values: Sequence[int], low: int, high: int) -> Callable[[Integers], Integers]:
    """Return a function from values between two bounds to their places; unlisted: the length."""
    kind = np.min_scalar_type(len(values))
    if high - low < _TABLE_SPAN:
        table = np.full(high - low + 1, len(values), dtype=kind)
        for place, value in enumerate(values):
            if low <= value <= high:
                table[value - low] = place
        return lambda part: table[_above(part, low)]
    inside = [place for place, value in enumerate(values) if low <= value <= high]
    if not inside:
        return lambda part: np.full(part.shape, len(values), dtype=kind)
    order = np.array(sorted(inside, key=values.__getitem__))
    ascending = np.array([values[place] for place in order.tolist()], dtype=_kind(high))

    def search(part: Integers) -> Integers:
        wide = part.astype(ascending.dtype)
        nearest = np.minimum(np.searchsorted(ascending, wide), len(order) - 1)
        return np.where(ascending[nearest] == wide, order[nearest], len(values)).astype(kind)

    return search
