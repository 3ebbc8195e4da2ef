"""Tiles: where they lie, how much each of their voxels counts, and padding of too small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Index = tuple[int | slice, ...]


def tile_starts(length: int, tile: int, step: float) -> tuple[int, ...]:
    """Return evenly spaced tile starts that cover one axis.

    Args:
        length: Axis length in voxels.
        tile: Tile length in voxels, at most `length`.
        step: Largest shift between tiles, as a fraction of `tile` in (0, 1].

    Returns:
        Ascending starts; the first is 0, the last `length - tile`.

    Raises:
        ValueError: If `tile` exceeds `length` or `step` is out of range.

    Source:
        Tile positions of nnU-Net v1 and v2 (halves are rounded to even).

    Examples:
        >>> tile_starts(110, tile=64, step=0.5)
        (0, 23, 46)
    """
    if not 0 < step <= 1:
        raise ValueError(f"step must be in (0, 1], got {step}")
    if tile > length:
        raise ValueError(f"tile is {tile} voxels, axis only {length}; pad first")
    gaps = math.ceil((length - tile) / (tile * step))
    stride = (length - tile) / max(gaps, 1)
    return tuple(round(number * stride) for number in range(gaps + 1))


def padding(shape: Sequence[int], tile: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the (before, after) voxels each axis lacks to hold one tile.

    The missing voxels are split evenly; an odd one goes after.

    Args:
        shape: Image shape in voxels.
        tile: Tile size in voxels, one entry per *trailing* axis of `shape`; leading axes of the
            image (the slice axis of a 2D configuration) need no padding.

    Examples:
        >>> padding((5, 3, 9), tile=(6, 6))
        ((0, 0), (1, 2), (0, 0))
    """
    leading = len(shape) - len(tile)
    missing = [max(size - length, 0) for length, size in zip(shape[leading:], tile, strict=True)]
    return ((0, 0),) * leading + tuple((lack // 2, lack - lack // 2) for lack in missing)


def tile_indices(shape: Sequence[int], tile: Sequence[int], step: float) -> list[Index]:
    """Return the index of every tile, first axis slowest.

    With a tile of fewer entries than `shape` (2D configurations) the leading axes are visited
    voxel by voxel, so a tile is a window of one slice.

    Args:
        shape: Image shape in voxels, at least `tile` along the trailing axes.
        tile: Tile size in voxels.
        step: Largest shift between tiles, as a fraction of the tile.

    Examples:
        >>> tile_indices((2, 4), tile=(3,), step=1.0)[:2]
        [(0, slice(0, 3, None)), (0, slice(1, 4, None))]
    """
    leading = len(shape) - len(tile)
    axes: list[list[int] | list[slice]] = [list(range(length)) for length in shape[:leading]]
    for length, size in zip(shape[leading:], tile, strict=True):
        axes.append([slice(start, start + size) for start in tile_starts(length, size, step)])
    return list(product(*axes))


def num_tiles(shape: Sequence[int], tile: Sequence[int], step: float) -> int:
    """Return how many tiles an image needs, padding included, without listing them.

    Examples:
        >>> num_tiles((5, 100, 20), tile=(64, 64), step=0.5)
        15
    """
    leading = len(shape) - len(tile)
    count = math.prod(shape[:leading])
    for length, size in zip(shape[leading:], tile, strict=True):
        count *= len(tile_starts(max(length, size), size, step))
    return count


@lru_cache(maxsize=16)
def importance(
    tile: tuple[int, ...],
    peak: float = 1.0,
    kind: Literal["float32", "float16"] = "float32",
) -> NDArray[np.floating[Any]]:
    """Return the Gaussian weight of each voxel of a tile: `peak` at the centre, never 0.

    Args:
        tile: Tile size in voxels.
        peak: Largest weight.
        kind: Type of the weights.

    Returns:
        Read-only array of shape `tile`.

    Source:
        Gaussian importance of nnU-Net v1 (peak 1, float32) and v2 (peak 10, float16): a unit
        impulse at `tile // 2`, filtered with a standard deviation of an eighth of the tile, divided
        by its maximum; zeros become the smallest weight that is not zero.
    """
    impulse = np.zeros(tile, dtype=np.float64)
    impulse[tuple(size // 2 for size in tile)] = 1.0
    sigma = [size / 8 for size in tile]
    smooth = ndimage.gaussian_filter(impulse, sigma, order=0, mode="constant", cval=0.0)
    weight: NDArray[np.floating[Any]] = (smooth / (smooth.max() / peak)).astype(np.float32)
    weight = weight.astype(kind, copy=False)  # by way of float32, as torch casts
    weight[weight == 0] = weight[weight > 0].min()
    weight.setflags(write=False)
    return weight
