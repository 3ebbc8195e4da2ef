"""Resampling of a patch at given positions: intensities, labels and the outside mask.

N counts rows that share one deformation: channels, and slices where only a plane is deformed.
V counts voxels of the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medseg.augment.sample import Sample
from medseg.augment.spare import Spare
from medseg.augment.spatial import Deformation, patch_offsets, source_positions

_SCORE_STEPS = 2048
_CODE_BITS = 21
_VOXELS_CPU = 1 << 17
_VOXELS_DEVICE = 1 << 19
_PLAIN_TYPES = (torch.uint8, torch.int16, torch.int32)


def deform(sample: Sample, *, deformation: Deformation, patch_size: Sequence[int]) -> Sample:
    """Resample one sample's channels, label maps and outside mask at the same positions.

    Args:
        sample: Arrays of the source's size.
        deformation: Over the last axes; other axes are left alone.
        patch_size: Voxels of the result along the deformed axes.

    Returns:
        The same with the patch's size along the deformed axes.
    """
    shape = sample.segmentation.shape
    source, others = shape[-len(patch_size) :], shape[: -len(patch_size)]
    rows = [sample.image, encode(sample.segmentation, sample.outside)]
    if sample.previous is not None:
        rows.append(encode(sample.previous, None))
    rows = [array.contiguous().reshape(-1, *source) for array in rows]
    results = [array.new_empty((len(array), *patch_size)) for array in rows]
    _resample(rows, results, deformation)
    labels, outside = results[1].reshape(*others, *patch_size), None
    if sample.outside is not None:
        labels, outside = decode(labels)
    previous = None
    if sample.previous is not None:
        previous = results[2].reshape(labels.shape).to(sample.previous.dtype)
    image = results[0].reshape(len(sample.image), *labels.shape)
    return Sample(image, labels.to(sample.segmentation.dtype), outside, previous)


def _resample(rows: Sequence[Tensor], results: Sequence[Tensor], deformation: Deformation) -> None:
    """Resample intensities, the first of `rows`, and codes, all others, slab by slab.

    Args:
        rows: Arrays (N, *source), contiguous.
        results: Where they go (N, *patch).
        deformation: Over all axes but the first.
    """
    device, source, patch_size = rows[0].device, rows[0].shape[1:], results[0].shape[1:]
    offsets = patch_offsets(deformation, patch_size, device)
    spare = Spare(device)
    for slab in _slabs(patch_size, max(map(len, rows)), device):
        some = [offset[slab] if len(offset) > 1 else offset for offset in offsets]
        cells = locate(source, source_positions(deformation.matrix, some, source), spare)
        resample_images(rows[0], cells, spare, out=results[0][:, slab])
        for codes, result in zip(rows[1:], results[1:], strict=True):
            resample_codes(codes, cells, spare, out=result[:, slab])


def _slabs(patch_size: Sequence[int], num_rows: int, device: torch.device) -> Iterator[slice]:
    """Cut the first axis so that what is held at a time stays in the processor's cache."""
    limit = _VOXELS_CPU if device.type == "cpu" else _VOXELS_DEVICE
    step = max(1, limit // (num_rows * math.prod(patch_size[1:])))
    for start in range(0, patch_size[0], step):
        yield slice(start, start + step)


def encode(labels: Tensor, outside: Tensor | None) -> Tensor:
    """Join labels and outside mask into codes, resampled along with each other.

    Returns:
        Without a mask the labels; with one twice the label, plus 1 outside. The type is int16 for
        labels of 8 bits with a mask, otherwise one of the types that codes may have.
    """
    if outside is None:
        return labels if labels.dtype in _PLAIN_TYPES else labels.to(torch.int32)
    dtype = torch.int16 if labels.dtype == torch.uint8 else torch.int32
    return labels.to(dtype, copy=True).mul_(2).add_(outside)


def decode(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Split codes that have a mask into labels, of the same type, and outside mask."""
    return codes >> 1, (codes & 1).bool()


@dataclass(frozen=True, slots=True)
class Cells:
    """The cell of 2**d source voxels around each position."""

    lowest: Tensor
    """Flat index (V,) of each cell's first corner, int32."""
    fractions: Tensor
    """For each axis, how far (d, V) the position lies towards the upper corners, 0 to 1."""
    steps: tuple[int, ...]
    """Flat distance of the 2**d corners from the first one, last axis fastest."""


def locate(size: Sequence[int], positions: Tensor, spare: Spare) -> Cells:
    """Find the cells around positions in a source of `size`.

    Args:
        size: Voxels along each axis.
        positions: Voxels (d, *V), float32; overwritten.
        spare: Where the result lies.
    """
    places = positions.reshape(len(size), -1)
    lowest = spare.take("lowest", places.shape[1:], dtype=torch.int32)
    index = spare.take("index", places.shape[1:], dtype=torch.int32)
    lower = spare.take("lower", places.shape[1:])
    strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    for axis, (place, n) in enumerate(zip(places.unbind(), size, strict=True)):
        torch.floor(place, out=lower).clamp_(max=max(n - 2, 0))
        place.sub_(lower)
        if axis == 0:
            lowest.copy_(lower).mul_(strides[0])
        else:
            lowest.add_(index.copy_(lower), alpha=strides[axis])
    steps = [(0, stride if n > 1 else 0) for stride, n in zip(strides, size, strict=True)]
    return Cells(lowest, places, tuple(sum(step) for step in itertools.product(*steps)))


def resample_images(rows: Tensor, cells: Cells, spare: Spare, *, out: Tensor) -> None:
    """Interpolate linearly.

    Args:
        rows: Intensities (N, *source), floating point, contiguous.
        cells: V cells of the source.
        spare: For what lies between.
        out: Where the intensities go, N times V voxels.
    """
    fractions = cells.fractions.to(rows.dtype).unbind()
    flat = rows.reshape(rows.shape[0], -1)
    shape = (rows.shape[0], cells.lowest.shape[0])
    names = [f"corner {number}" for number in range(len(fractions) + 1)]
    pieces = [spare.take(name, shape, dtype=rows.dtype) for name in names]

    def fold(first: int, axis: int, piece: int) -> Tensor:
        """Interpolate along `axis` and those after it, from corner number `first` on."""
        if axis == len(fractions):
            return _read(flat, cells.lowest, cells.steps[first], out=pieces[piece])
        lower = fold(first, axis + 1, piece)
        upper = fold(first + (1 << (len(fractions) - 1 - axis)), axis + 1, piece + 1)
        return lower.addcmul_(fractions[axis], upper.sub_(lower))

    out.copy_(fold(0, 0, 0).reshape(out.shape))


def resample_codes(rows: Tensor, cells: Cells, spare: Spare, *, out: Tensor) -> None:
    """Resample integer codes by a vote of the surrounding voxels.

    Every code's indicator is interpolated linearly and the largest value wins; equal values go to
    the nearest voxel's code if it is among them, otherwise to the smallest. Codes are never
    listed, so their number does not matter and the device is not waited for.

    Args:
        rows: Codes (N, *source), in [0, 2**21), contiguous.
        cells: V cells of the source.
        spare: For what lies between.
        out: Where the codes go, N times V voxels.

    Source:
        Behaviour of batchgeneratorsv2's SpatialTransform (one indicator per label, argmax).
    """
    flat = rows.reshape(rows.shape[0], -1)
    if rows.device.type == "cpu":
        winners = _vote_where_mixed(flat, cells, spare)
    else:
        corners = [flat[:, step:].index_select(1, cells.lowest) for step in cells.steps]
        winners = _vote(torch.stack(corners), cells.fractions)
    out.copy_(winners.reshape(out.shape))


def _read(rows: Tensor, places: Tensor, step: int, *, out: Tensor) -> Tensor:
    """Read each row `step` after the given places; on the CPU faster one row at a time."""
    if rows.device.type != "cpu":
        return torch.index_select(rows[:, step:], 1, places, out=out)
    for number in range(rows.shape[0]):
        torch.index_select(rows[number, step:], 0, places, out=out[number])
    return out


def _vote_where_mixed(rows: Tensor, cells: Cells, spare: Spare) -> Tensor:
    """Vote only in cells whose corners differ, a few percent of them."""
    names = ("lowest corner", "this corner", "smallest", "largest")
    shape = (rows.shape[0], cells.lowest.shape[0])
    lowest, this, smallest, largest = (spare.take(n, shape, dtype=rows.dtype) for n in names)
    smallest.copy_(_read(rows, cells.lowest, 0, out=lowest))
    largest.copy_(lowest)
    for step in cells.steps[1:]:
        _read(rows, cells.lowest, step, out=this)
        torch.minimum(smallest, this, out=smallest)
        torch.maximum(largest, this, out=largest)
    found = np.flatnonzero((smallest != largest).numpy())
    if found.size:
        places = torch.from_numpy(found)
        columns = places % shape[1]
        first = cells.lowest.index_select(0, columns) + places // shape[1] * rows.shape[1]
        flat = rows.reshape(-1)
        corners = torch.stack([flat.index_select(0, first + step) for step in cells.steps])
        winners = _vote(corners, cells.fractions.index_select(1, columns))
        lowest.reshape(-1)[places] = winners
    return lowest


def _vote(corners: Tensor, fractions: Tensor) -> Tensor:
    """Return the code with the largest weight among the corners.

    Args:
        corners: Codes (2**d, ..., V), last axis fastest.
        fractions: For each of the d axes, how far (d, V) the position lies towards the upper
            corner.
    """
    pairs = itertools.product(*((1 - fraction, fraction) for fraction in fractions))
    weights = torch.stack([math.prod(pair[1:], start=pair[0]) for pair in pairs])
    weights = weights.reshape(len(corners), *([1] * (corners.ndim - 2)), -1)
    agrees = weights.new_empty((len(corners), *corners.shape))
    scores = torch.eq(corners[:, None], corners, out=agrees).mul_(weights).sum(1)
    ranks = (
        (scores * _SCORE_STEPS)
        .round_()
        .long()
        .mul_(2)
        .add_(corners == _nearest(corners, fractions))
    )
    last = (1 << _CODE_BITS) - 1
    best = ranks.bitwise_left_shift_(_CODE_BITS).add_(last - corners.long()).amax(0)
    return (last - (best & last)).to(corners.dtype)


def _nearest(corners: Tensor, fractions: Tensor) -> Tensor:
    """Return the value of the nearest corner."""
    for fraction in reversed(fractions):
        corners = torch.where(fraction < 0.5, corners[::2], corners[1::2])
    return corners[0]
