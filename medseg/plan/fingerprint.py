"""Statistics of a raw data set, gathered case by case and then pooled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.crop import crop, nonzero_box
from medseg.data.facts import intensities
from medseg.errors import DatasetError
from medseg.geometry import Grid, orient, reorient
from medseg.plan.frame import PLANNER_AXES
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics

NUM_SAMPLES = 100_000_000
"""Foreground voxels drawn from the whole data set, per channel."""
SEED = 1234
"""Seed of the draw, the same in every case."""
DRAW = 1 << 22
"""Voxels drawn at a time."""
_STREAM_LIMIT = 1 << 20
_BLOCK = 1 << 10
FEW_PIXELS = 1 << 16
"""Pixels up to which draws are counted pixel by pixel."""
SPACING_DIGITS = 6
"""Significant digits of a voxel size; headers in single precision hold no more."""

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Intensities drawn from the foreground of one channel, as a table."""

    values: Float32
    """Distinct values, ascending."""
    counts: npt.NDArray[np.int32]
    """How often each was drawn."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CaseStatistics:
    """What one case contributes to the fingerprint."""

    case: CaseFingerprint
    """Shape, spacing and intensities; what was segmented is not in it."""
    relative_size: float
    """Voxels of the non-zero box per voxel of the image."""
    samples: tuple[Samples, ...]
    """Foreground intensities of each channel; empty without foreground."""


def samples_per_case(num_cases: int) -> int:
    """Return how many foreground voxels are drawn from each case of a data set.

    Examples:
        >>> samples_per_case(200)
        500000
    """
    return NUM_SAMPLES // max(1, num_cases)


def case_fingerprint(
    channels: Float32,
    affine: npt.ArrayLike,
    segmentation: npt.NDArray[Any] | None,
    *,
    num_samples: int,
    seed: int = SEED,
) -> CaseStatistics:
    """Measure one case.

    The same image gives the same result in each of the 48 ways of storing it.

    Args:
        channels: (C, I, J, K), as read.
        affine: (4, 4) voxel index to RAS+ mm.
        segmentation: (I, J, K) label map on the same grid; None for a case without labels.
        num_samples: Foreground voxels to draw, with replacement, from each channel.
        seed: Seed of the draw.

    Source:
        Behaviour of nnU-Net 2.8.1's fingerprint extractor: foreground is every label but 0 inside
        the non-zero box (ignored voxels too), voxels run through axis I first, then J, then K, and
        one legacy generator serves the channels in turn.
    """
    axes, flips = orient(affine, PLANNER_AXES)
    image = _turned(channels, axes, flips)
    box = nonzero_box(image)
    lengths = [high - low for low, high in box]
    i, j, k = channels.shape[1:]
    grid = reorient(Grid((i, j, k), np.asarray(affine)), axes, flips)
    samples = (_NOTHING,) * len(channels)
    if segmentation is not None:
        foreground = crop(_turned(segmentation, axes, flips), box) > 0
        samples = draw_samples(crop(image, box), foreground, num_samples=num_samples, seed=seed)
    return CaseStatistics(
        case=CaseFingerprint(
            shape=_canonical(grid.shape),
            shape_cropped=_canonical(lengths),
            spacing=_canonical([float(f"{v:.{SPACING_DIGITS}g}") for v in grid.spacing]),
            intensities=intensities(channels, affine),
        ),
        relative_size=math.prod(lengths) / math.prod(grid.shape),
        samples=samples,
    )


def draw_samples(
    channels: Float32, foreground: npt.NDArray[np.bool_], *, num_samples: int, seed: int
) -> tuple[Samples, ...]:
    """Draw foreground intensities with replacement.

    Cases count alike in the pooled statistics, however large their foreground.

    Args:
        channels: (C, *spatial).
        foreground: (*spatial) where to draw.
        num_samples: Voxels to draw from each channel.
        seed: Seed of the draw.

    Returns:
        One table for each channel; empty tables if there is no foreground.
    """
    if len(channels) == 1 and 1 < (num_pixels := int(np.count_nonzero(foreground))) <= FEW_PIXELS:
        times = times_drawn(num_pixels, num_samples, seed)
        if times is not None:
            return (_weighed(channels[0][foreground], times),)
    generator = np.random.RandomState(seed)
    found = []
    for channel in channels:
        pixels = channel[foreground]
        if not len(pixels):
            found.append(_NOTHING)
            continue
        found.append(_table(pixels, num_samples, generator))
    return tuple(found)


def _table(pixels: Float32, num_samples: int, generator: np.random.RandomState) -> Samples:
    """Draw from the pixels and count each distinct value.

    Few pixels: how often each was drawn is counted; many: the drawn values are.
    """
    starts = range(0, num_samples, DRAW)
    draws = (generator.randint(0, len(pixels), min(DRAW, num_samples - start)) for start in starts)
    if len(pixels) <= FEW_PIXELS:
        times = np.zeros(len(pixels), dtype=np.int64)
        for draw in draws:
            times += np.bincount(draw, minlength=len(pixels))
        return _weighed(pixels, times)
    if (steps := _as_steps(pixels)) is not None:
        lowest, levels = steps
        times = np.zeros(int(levels.max()) + 1, dtype=np.int64)
        for draw in draws:
            times += np.bincount(levels.take(draw), minlength=len(times))
        present = np.flatnonzero(times)
        values = (present + lowest).astype(np.float32)
        return Samples(values=values, counts=times[present].astype(np.int32))
    drawn = np.empty(num_samples, dtype=np.float32)
    for start, draw in zip(starts, draws, strict=True):
        np.take(pixels, draw, out=drawn[start : start + len(draw)], mode="clip")
    drawn.sort()
    ends = np.append(np.flatnonzero(drawn[1:] != drawn[:-1]), num_samples - 1)
    return Samples(values=drawn[ends], counts=np.diff(ends, prepend=-1).astype(np.int32))


def _weighed(pixels: Float32, times: npt.NDArray[np.int64]) -> Samples:
    """Return the table of pixels each of which was drawn a number of times."""
    values, place = np.unique(pixels[times > 0], return_inverse=True)
    counts = np.bincount(place, weights=times[times > 0])
    return Samples(values=values, counts=counts.astype(np.int32))


def times_drawn(num_pixels: int, num_samples: int, seed: int) -> npt.NDArray[np.int64] | None:
    """Return how often each pixel is drawn by a new legacy generator's first draw.

    The generator masks a stream of 32-bit numbers and rejects what is too large. The stream is the
    same for every case of a data set, so it is made once; nothing else depends on the case.

    Args:
        num_pixels: At least 2.
        num_samples: Draws.
        seed: Seed of the generator.

    Returns:
        (num_pixels) counts; None where the stream that is kept is too short.
    """
    bits = (num_pixels - 1).bit_length()
    stream = _stream(seed, min(num_samples, _STREAM_LIMIT) * 2 + _BLOCK)
    length = min(len(stream), int(num_samples * 2**bits / num_pixels * 1.02) + _BLOCK)
    numbers = stream[: length - length % _BLOCK] & np.uint32(2**bits - 1)
    accepted = np.cumsum((numbers < num_pixels).reshape(-1, _BLOCK).sum(1))
    block = int(np.searchsorted(accepted, num_samples))
    if block == len(accepted):
        return None
    before = int(accepted[block - 1]) if block else 0
    last = numbers[block * _BLOCK : (block + 1) * _BLOCK]
    end = int(np.flatnonzero(last < num_pixels)[num_samples - before - 1]) + 1
    return np.bincount(numbers[: block * _BLOCK + end], minlength=2**bits)[:num_pixels]


@lru_cache(maxsize=1)
def _stream(seed: int, length: int) -> npt.NDArray[np.uint32]:
    generator = np.random.RandomState(seed)
    return generator.randint(0, 2**32, length, dtype=np.uint32)


def _as_steps(pixels: Float32) -> tuple[int, npt.NDArray[np.uint16]] | None:
    """Return integers as (lowest, distance to it), or None where they are no such numbers."""
    lowest, highest = float(pixels.min()), float(pixels.max())
    if highest - lowest > np.iinfo(np.uint16).max or abs(lowest) > 2**23 or lowest % 1:
        return None
    levels = (pixels - np.float32(lowest)).astype(np.uint16)
    return (int(lowest), levels) if (levels + np.float32(lowest) == pixels).all() else None


def pool(cases: Mapping[str, CaseStatistics]) -> Fingerprint:
    """Put the statistics of all cases together.

    Args:
        cases: Case id -> its statistics.

    Raises:
        DatasetError: If there is no case, or none has foreground, or their channels differ.
    """
    if not cases:
        raise DatasetError("no case to take a fingerprint of; expected at least one labelled case.")
    num_channels = {case_id: len(item.samples) for case_id, item in cases.items()}
    if len(set(num_channels.values())) > 1:
        raise DatasetError(f"cases differ in their number of channels: {num_channels}.")
    sizes = [item.relative_size for item in cases.values()]
    return Fingerprint(
        cases={case_id: item.case for case_id, item in cases.items()},
        channels=tuple(
            pool_samples(channel)
            for channel in zip(*(c.samples for c in cases.values()), strict=True)
        ),
        median_relative_size_after_cropping=float(np.median(sizes)),
    )


def pool_samples(samples: Sequence[Samples]) -> IntensityStatistics:
    """Return the statistics of one channel over all cases, every draw counted.

    The tables are never put together: the memory needed is that of the largest.

    Raises:
        DatasetError: If nothing was drawn.
    """
    tables = [table for table in samples if len(table.values)]
    if not tables:
        raise DatasetError(
            "no case has a foreground voxel (a label above 0 inside the non-zero part of the "
            "image); expected at least one. Check that labels and images belong together."
        )
    total = sum(int(table.counts.sum(dtype=np.int64)) for table in tables)
    mean = sum(float(table.counts @ table.values.astype(np.float64)) for table in tables) / total
    squares = sum(float(table.counts @ (table.values - np.float64(mean)) ** 2) for table in tables)
    low, median, high = percentiles(tables, (0.5, 50.0, 99.5))
    return IntensityStatistics(
        mean=mean,
        std=math.sqrt(squares / total),
        median=median,
        min=min(float(table.values[0]) for table in tables),
        max=max(float(table.values[-1]) for table in tables),
        percentile_00_5=low,
        percentile_99_5=high,
    )


def percentiles(tables: Sequence[Samples], percents: Sequence[float]) -> tuple[float, ...]:
    """Return percentiles of all draws, linear between the two nearest.

    Args:
        tables: At least one, none empty.
        percents: 0 to 100.
    """
    total = sum(int(table.counts.sum(dtype=np.int64)) for table in tables)
    places = np.array(percents) / 100 * (total - 1)
    below = np.floor(places).astype(np.int64)
    ranks = np.concatenate([below, np.minimum(below + 1, total - 1)])
    first, second = _drawn_at(tables, ranks).reshape(2, -1)
    return tuple(float(v) for v in first + (second - first) * (places - below))


def _drawn_at(tables: Sequence[Samples], ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the draws of the given ranks (0: the smallest), bisecting over all float32 values."""
    ends = [np.concatenate([[0], np.cumsum(table.counts, dtype=np.int64)]) for table in tables]
    low = np.full(ranks.shape, min(int(_to_keys(table.values[:1])[0]) for table in tables))
    high = np.full(ranks.shape, max(int(_to_keys(table.values[-1:])[0]) for table in tables))
    while (low < high).any():
        middle = (low + high) // 2
        value = _from_keys(middle)
        drawn = sum(
            end[np.searchsorted(table.values, value, side="right")]
            for table, end in zip(tables, ends, strict=True)
        )
        high = np.where(drawn > ranks, middle, high)
        low = np.where(drawn > ranks, low, middle + 1)
    return _from_keys(high).astype(np.float64)


def _to_keys(values: Float32) -> npt.NDArray[np.int64]:
    """Return integers in the order of the values, consecutive for consecutive floats."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_keys(keys: npt.NDArray[np.int64]) -> Float32:
    bits = np.where(keys < 0, 0x80000000 - keys, keys)
    return bits.astype(np.uint32).view(np.float32)


_NOTHING = Samples(values=np.empty(0, np.float32), counts=np.empty(0, np.int32))


def _turned(
    array: npt.NDArray[Any], axes: Sequence[int], flips: Sequence[bool]
) -> npt.NDArray[Any]:
    """Return a view of (..., I, J, K) with axes in planner order and direction."""
    leading = array.ndim - 3
    view = array.transpose(*range(leading), *(leading + axis for axis in axes))
    return np.flip(view, tuple(leading + d for d, flip in enumerate(flips) if flip))


def _canonical(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return planner-order values in the order I, J, K."""
    a, b, c = (values[PLANNER_AXES.index(axis)] for axis in range(3))
    return a, b, c
