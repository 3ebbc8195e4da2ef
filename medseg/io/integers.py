"""Values of a segmentation file: are they labels, and which?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.image import Stored

INTEGER_TOLERANCE = 1e-4
"""Values this close to an integer, as scaling leaves them, count as that integer."""
_LOWEST, _HIGHEST = -(2**31), 2**32 - 1
"""Labels have 32 bits."""
_HIGHEST_SIGNED = 2**31 - 1
"""Largest label where some are negative."""
_BLOCK = 2**18

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotIntegers:
    """Voxels that hold no label."""

    num_voxels: int
    num_nan: int
    num_infinite: int
    num_beyond: int
    """Voxels that hold an integer which is no label, since it needs more than 32 bits."""
    low: int
    """Smallest integer."""
    high: int
    """Largest integer."""
    example: float
    """A value that is no integer; 0 where all are."""

    @property
    def num_fractions(self) -> int:
        """Return the number of voxels that hold a finite number which is no integer."""
        return self.num_voxels - self.num_nan - self.num_infinite - self.num_beyond


def as_integers(stored: Stored) -> Integers | NotIntegers:
    """Return a label map as integers, or what keeps it from being one.

    Args:
        stored: (I, J, K) values as stored, with their scaling.

    Returns:
        (I, J, K): the stored array itself where it holds unscaled integers in the order of bytes
        of this machine, else of the smallest type.
    """
    array = stored.array
    if array.dtype.kind in "iub" and (stored.slope, stored.inter) == (1.0, 0.0):
        kind = np.uint8 if array.dtype.kind == "b" else array.dtype.newbyteorder("=")
        return _in_range(array.astype(kind, copy=False))
    flat = array.ravel(order="F")
    found = _range(flat, stored)
    if isinstance(found, NotIntegers):
        return found
    whole = np.empty(flat.size, dtype=smallest_type(*found))
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        whole[part] = np.rint(_scaled(flat[part], stored))
    result: Integers = whole.reshape(array.shape, order="F")
    return result


def smallest_type(low: int, high: int) -> np.dtype[Any]:
    """Return the smallest integer type for labels, unsigned unless some are negative.

    Examples:
        >>> smallest_type(0, 255), smallest_type(-1, 200)
        (dtype('uint8'), dtype('int16'))
    """
    kinds = ("u1", "u2", "u4", "u8") if low >= 0 else ("i1", "i2", "i4", "i8")
    fitting = (k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return np.dtype(next(fitting))


def _highest(low: int) -> int:
    return _HIGHEST if low >= 0 else _HIGHEST_SIGNED


def _in_range(array: Integers) -> Integers | NotIntegers:
    """Return stored integers if they are labels; only types of 64 bits can be anything else."""
    if array.dtype.itemsize < 8 or not array.size:
        return array
    low, high = int(array.min()), int(array.max())
    if low >= _LOWEST and high <= _highest(low):
        return array
    beyond = int(np.count_nonzero(array > _highest(low)))
    if low < _LOWEST:
        beyond += int(np.count_nonzero(array < _LOWEST))
    return NotIntegers(
        num_voxels=beyond, num_nan=0, num_infinite=0, num_beyond=beyond, low=low, high=high,
        example=0.0,
    )  # fmt: skip


def _scaled(block: NDArray[Any], stored: Stored) -> NDArray[np.float64]:
    values: NDArray[np.float64] = block * np.float64(stored.slope) + stored.inter
    return values


def _range(flat: NDArray[Any], stored: Stored) -> tuple[int, int] | NotIntegers:
    """Return the smallest and the largest label."""
    counts = np.zeros(3, dtype=np.int64)
    low, high, example = math.inf, -math.inf, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, _BLOCK):
            values = _scaled(flat[start : start + _BLOCK], stored)
            whole = np.rint(values)
            wrong = ~(np.abs(values - whole) <= INTEGER_TOLERANCE)
            if wrong.any():
                example = example if counts[0] else float(values[wrong][0])
                counts += (wrong.sum(), np.isnan(values).sum(), np.isinf(values).sum())
                whole = whole[~wrong]
            low = min(low, float(whole.min(initial=low)))
            high = max(high, float(whole.max(initial=high)))
    found = (int(low), int(high)) if low <= high else (0, 0)
    is_inside = found[0] >= _LOWEST and found[1] <= _highest(found[0])
    if is_inside and not counts[0]:
        return found
    beyond = 0 if is_inside else _num_beyond(flat, stored, _highest(found[0]))
    return NotIntegers(
        num_voxels=int(counts[0]) + beyond,
        num_nan=int(counts[1]),
        num_infinite=int(counts[2]),
        num_beyond=beyond,
        low=found[0],
        high=found[1],
        example=example,
    )


def _num_beyond(flat: NDArray[Any], stored: Stored, highest: int) -> int:
    """Return the number of voxels whose value is an integer but no label."""
    count = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, _BLOCK):
            values = _scaled(flat[start : start + _BLOCK], stored)
            whole = np.rint(values)
            is_integer = np.abs(values - whole) <= INTEGER_TOLERANCE
            count += int((is_integer & ((whole < _LOWEST) | (whole > highest))).sum())
    return count
