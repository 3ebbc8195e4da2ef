"""Resampling of a patch at given positions: intensities, labels and the outside mask.

N counts rows that share one deformation: channels, and slices where only a plane is deformed.
V counts voxels of the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medseg.augment.spatial import Deformation, patch_offsets, source_positions

_SCORE_STEPS = 2048
_CODE_BITS = 21
_VOXELS_CPU = 1 << 17
_VOXELS_DEVICE = 1 << 18


def centre(array: Tensor, size: Sequence[int], *, fill: float = 0) -> Tensor:
    """Return the centred box of `size` over the last axes; `fill` where the array is smaller.

    Examples:
        >>> centre(torch.arange(5), [3]).tolist(), centre(torch.arange(2), [4]).tolist()
        ([1, 2, 3], [0, 0, 1, 0])
    """
    shape = array.shape[array.ndim - len(size) :]
    pads = [
        (wanted // 2 - n // 2, wanted - n - (wanted // 2 - n // 2)) if n < wanted else (0, 0)
        for wanted, n in zip(size, shape, strict=True)
    ]
    if any(map(any, pads)):
        flat = list(itertools.chain(*reversed(pads)))
        array = functional.pad(array, flat, value=fill)
    for axis, wanted in enumerate(size, start=array.ndim - len(size)):
        array = array.narrow(axis, array.shape[axis] // 2 - wanted // 2, wanted)
    return array


def mirror(array: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Reverse axes, for any type (torch itself does not for unsigned integers of 16 bits)."""
    if array.dtype == torch.uint16:
        return array.view(torch.int16).flip(axes).view(torch.uint16)
    return array.flip(axes)


def deform(
    image: Tensor,
    segmentation: Tensor,
    outside: Tensor | None,
    *,
    deformation: Deformation,
    patch_size: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Resample one sample's channels, labels and outside mask at the same positions.

    Args:
        image: Intensities (C, *source).
        segmentation: Labels (*source), any integer type, in [0, 2**20).
        outside: Boolean (*source), or None.
        deformation: Over the last axes; other axes are left alone.
        patch_size: Voxels of the result along the deformed axes.

    Returns:
        The same with the patch's size along the deformed axes.
    """
    source = segmentation.shape[segmentation.ndim - len(patch_size) :]
    size = (*segmentation.shape[: segmentation.ndim - len(patch_size)], *patch_size)
    images = image.contiguous().reshape(-1, *source)
    codes = encode(segmentation, outside).contiguous().reshape(-1, *source)
    images_out = image.new_empty((len(images), *patch_size))
    codes_out = codes.new_empty((len(codes), *patch_size))
    offsets = patch_offsets(deformation, patch_size, image.device)
    for rows in _slabs(patch_size, len(images) + len(codes), image.device):
        some = [offset[rows] if len(offset) > 1 else offset for offset in offsets]
        cells = locate(source, source_positions(deformation.matrix, some, source))
        resample_images(images, cells, out=images_out[:, rows])
        resample_codes(codes, cells, out=codes_out[:, rows])
    labels, mask = decode(codes_out.reshape(size))
    return (
        images_out.reshape(len(image), *size),
        labels.to(segmentation.dtype),
        None if outside is None else mask,
    )


def _slabs(patch_size: Sequence[int], num_rows: int, device: torch.device) -> Iterator[slice]:
    """Cut the first axis so that what is held at a time stays in the processor's cache."""
    limit = _VOXELS_CPU if device.type == "cpu" else _VOXELS_DEVICE
    step = max(1, limit // (num_rows * math.prod(patch_size[1:])))
    for start in range(0, patch_size[0], step):
        yield slice(start, start + step)


def encode(segmentation: Tensor, outside: Tensor | None) -> Tensor:
    """Join labels and outside mask (or None) into codes, resampled along with each other.

    Returns:
        Twice the label, plus 1 outside: int16 for labels of 8 bits, otherwise int32.
    """
    codes = segmentation.to(torch.int16 if segmentation.dtype == torch.uint8 else torch.int32) * 2
    return codes if outside is None else codes.add_(outside)


def decode(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Split codes into labels, int32, and outside mask."""
    return codes >> 1, (codes & 1).bool()


@dataclass(frozen=True, slots=True)
class Cells:
    """The cell of 2**d source voxels around each position."""

    lowest: Tensor
    """Flat index (V,) of each cell's first corner."""
    fractions: tuple[Tensor, ...]
    """For each axis, how far (V,) the position lies towards the upper corners, 0 to 1."""
    steps: tuple[int, ...]
    """Flat distance of the 2**d corners from the first one, last axis fastest."""


def locate(size: Sequence[int], positions: Sequence[Tensor]) -> Cells:
    """Find the cells around positions (voxels, one tensor for each axis) in a source of `size`."""
    strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    lower = [p.floor().clamp_(max=max(n - 2, 0)) for p, n in zip(positions, size, strict=True)]
    terms = [low.int() * stride for low, stride in zip(lower, strides, strict=True)]
    steps = [(0, stride if n > 1 else 0) for stride, n in zip(strides, size, strict=True)]
    return Cells(
        lowest=sum(terms[1:], start=terms[0]).long().reshape(-1),
        fractions=tuple((p - low).reshape(-1) for p, low in zip(positions, lower, strict=True)),
        steps=tuple(sum(step) for step in itertools.product(*steps)),
    )


def resample_images(rows: Tensor, cells: Cells, *, out: Tensor) -> None:
    """Interpolate linearly.

    Args:
        rows: Intensities (N, *source), floating point, contiguous.
        cells: V cells of the source.
        out: Where the intensities go, N times V voxels.
    """
    fractions = [fraction.to(rows.dtype) for fraction in cells.fractions]
    corners = _read_corners(rows, cells)
    result = _fold(corners, fractions, lambda low, high, t: torch.addcmul(low, t, high - low))
    out.copy_(result.reshape(out.shape))


def resample_codes(rows: Tensor, cells: Cells, *, out: Tensor) -> None:
    """Resample integer codes by a vote of the surrounding voxels.

    Every code's indicator is interpolated linearly and the largest value wins; equal values go to
    the nearest voxel's code if it is among them, otherwise to the smallest. Codes are never
    listed, so their number does not matter and the device is not waited for.

    Args:
        rows: Codes (N, *source), in [0, 2**21), contiguous.
        cells: V cells of the source.
        out: Where the codes go, N times V voxels.

    Source:
        Behaviour of batchgeneratorsv2's SpatialTransform (one indicator per label, argmax).
    """
    corners = _read_corners(rows, cells)
    if rows.device.type == "cpu":
        winners = _vote_where_mixed(corners, cells.fractions)
    else:
        winners = _vote(torch.stack(corners), cells.fractions)
    out.copy_(winners.reshape(out.shape))


def _read_corners(rows: Tensor, cells: Cells) -> list[Tensor]:
    """Return the corners' values, one tensor (N, V) for each step."""
    flat = rows.reshape(len(rows), -1)
    index = cells.lowest.expand(len(rows), -1)
    return [flat[:, step:].gather(1, index) for step in cells.steps]


def _fold(
    corners: Sequence[Tensor],
    fractions: Sequence[Tensor],
    combine: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Combine the corners pairwise, last axis first, until one value is left."""
    for fraction in reversed(fractions):
        corners = [combine(corners[i], corners[i + 1], fraction) for i in range(0, len(corners), 2)]
    return corners[0]


def _vote_where_mixed(corners: Sequence[Tensor], fractions: Sequence[Tensor]) -> Tensor:
    """Vote only in cells whose corners differ, a few percent of them."""
    winners = corners[0]
    mixed = corners[1] != winners
    for corner in corners[2:]:
        mixed |= corner != winners
    row, column = mixed.nonzero(as_tuple=True)
    if len(row):
        some = torch.stack([corner[row, column] for corner in corners])
        winners[row, column] = _vote(some, [fraction[column] for fraction in fractions])
    return winners


def _vote(corners: Tensor, fractions: Sequence[Tensor]) -> Tensor:
    """Return the code with the largest weight among the corners.

    Args:
        corners: Codes (2**d, ..., V), last axis fastest.
        fractions: For each of the d axes, how far (V,) the position lies towards the upper corner.
    """
    pairs = itertools.product(*((1 - fraction, fraction) for fraction in fractions))
    weights = torch.stack([math.prod(pair[1:], start=pair[0]) for pair in pairs])
    weights = weights.reshape(len(corners), *([1] * (corners.ndim - 2)), -1)
    nearest = _fold(
        corners.unbind(), fractions, lambda low, high, t: torch.where(t < 0.5, low, high)
    )
    scores = torch.where(corners[:, None] == corners, weights, 0).sum(1)
    ranks = (scores * _SCORE_STEPS).round_().long().mul_(2).add_(corners == nearest)
    last = (1 << _CODE_BITS) - 1
    best = ranks.bitwise_left_shift_(_CODE_BITS).add_(last - corners.long()).amax(0)
    return (last - (best & last)).to(corners.dtype)
