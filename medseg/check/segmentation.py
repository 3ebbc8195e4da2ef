"""Values of a segmentation file: are they labels, and which?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.image import Stored

INTEGER_TOLERANCE = 1e-4
"""Values this close to an integer, as scaling leaves them, count as that integer."""
_LARGEST = 2.0**62
_BLOCK = 2**18

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotIntegers:
    """Voxels that hold no label."""

    num_voxels: int
    num_nan: int
    num_infinite: int
    example: float
    """One of the values."""


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
        return array.astype(kind, copy=False)
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


def _scaled(block: NDArray[Any], stored: Stored) -> NDArray[np.float64]:
    values: NDArray[np.float64] = block * np.float64(stored.slope) + stored.inter
    return values


def _range(flat: NDArray[Any], stored: Stored) -> tuple[int, int] | NotIntegers:
    """Return the smallest and the largest label."""
    counts = np.zeros(3, dtype=np.int64)
    low, high, example = np.inf, -np.inf, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.size, _BLOCK):
            values = _scaled(flat[start : start + _BLOCK], stored)
            whole = np.rint(values)
            wrong = ~((np.abs(values - whole) <= INTEGER_TOLERANCE) & (np.abs(whole) < _LARGEST))
            if wrong.any():
                counts += (wrong.sum(), np.isnan(values).sum(), np.isinf(values).sum())
                example = float(values[wrong][0])
            low, high = min(low, float(whole.min())), max(high, float(whole.max()))
    if not counts[0]:
        return int(low), int(high)
    return NotIntegers(
        num_voxels=int(counts[0]),
        num_nan=int(counts[1]),
        num_infinite=int(counts[2]),
        example=example,
    )
