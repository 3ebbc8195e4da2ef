"""Intensities of one channel: converted and measured in one pass, block by block."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import canonical_axes
from medseg.schema.check import ChannelFacts

_BLOCK = 2**16
"""Voxels worked on at a time; they stay in the processor's cache."""
_LATTICE = 32
"""Largest number of lattice points along an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one pass over a channel found."""

    facts: ChannelFacts
    """Of the finite voxels."""
    num_nan: int
    num_infinite: int
    checksum: int
    """Sum of the voxels' bit patterns, which does not depend on their order."""


def convert(
    volume: NDArray[Any], out: NDArray[np.float32], *, slope: float, inter: float
) -> Measured:
    """Write the intensities of a stored volume and measure them.

    Args:
        volume: (I, J, K) values as stored, of any real type.
        out: (I, J, K) float32 that is filled with `volume * slope + inter`, computed in double
            precision where that is not the identity. Both run through memory along I first.
        slope: Factor.
        inter: Summand.
    """
    source, target = volume.ravel(order="F"), out.ravel(order="F")
    copied = not np.shares_memory(target, out)
    is_scaled = (slope, inter) != (1.0, 0.0)
    low, high, total, squares, checksum = math.inf, -math.inf, 0.0, 0.0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, source.size, _BLOCK):
            block = target[start : start + _BLOCK]
            values = source[start : start + _BLOCK]
            block[...] = values * np.float64(slope) + inter if is_scaled else values
            low, high = min(low, float(block.min())), max(high, float(block.max()))
            exact = block.astype(np.float64)
            total += float(exact.sum())
            squares += float(np.square(exact, out=exact).sum())
            checksum += int(block.view(np.uint32).sum(dtype=np.uint64))
    if copied:
        out[...] = target.reshape(out.shape, order="F")
    if math.isfinite(total):
        mean = total / target.size
        std = math.sqrt(max(squares / target.size - mean**2, 0.0))
        facts = ChannelFacts(min=low, max=high, mean=mean, std=std, median=_median(lattice(out)))
        return Measured(facts=facts, num_nan=0, num_infinite=0, checksum=checksum)
    return _with_gaps(target, checksum)


def _with_gaps(values: NDArray[np.float32], checksum: int) -> Measured:
    """Measure the finite ones among values some of which are not."""
    num_nan, num_infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        finite = np.zeros(1)
    facts = ChannelFacts(
        min=float(finite.min()),
        max=float(finite.max()),
        mean=float(finite.mean()),
        std=float(finite.std()),
        median=_median(finite[:: max(1, finite.size // _LATTICE**3)]),
    )
    return Measured(facts=facts, num_nan=num_nan, num_infinite=num_infinite, checksum=checksum)


def lattice(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of voxels on a regular lattice, at most 32 along each axis.

    Args:
        array: (I, J, K).
    """
    steps = tuple(slice(None, None, -(-length // _LATTICE)) for length in array.shape)
    return array[steps]


def picture_hash(array: NDArray[np.float32], affine: NDArray[np.float64], checksum: int) -> str:
    """Return a hash that is equal for the same image in any of the 48 ways of storing it.

    It covers the shape, a lattice of voxels on canonical axes, and every voxel's value by the
    checksum, so a different image has another one, save for voxels that changed places outside
    the lattice.

    Args:
        array: (I, J, K).
        affine: (4, 4) voxel index to RAS+ mm.
        checksum: Of all voxels, as `convert` returns it.
    """
    axes, flips = canonical_axes(affine)
    view = np.flip(array.transpose(axes), tuple(d for d, flip in enumerate(flips) if flip))
    digest = hashlib.sha256(f"{view.shape} {checksum}".encode())
    digest.update(lattice(view).tobytes())
    return digest.hexdigest()


def _median(values: NDArray[Any]) -> float:
    return float(np.median(values))
