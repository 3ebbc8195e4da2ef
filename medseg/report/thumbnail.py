"""Small pictures of a case, quickly made: image and outlines of the labels, in three planes."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.case import case_paths
from medseg.errors import MedsegError
from medseg.geometry import Grid, canonical_axes, reorient
from medseg.io.colour import in_colours, one_channel
from medseg.io.image import Stored
from medseg.io.integers import NotIntegers, as_integers
from medseg.io.read import read_stored
from medseg.report.palette import COLOURS
from medseg.report.planes import PLANES, Plane, Voxel, centre_of_largest
from medseg.schema.dataset import DatasetSpec
from medseg.values import distinct_values, places_in, values_at

SIZE = 132
"""Length of the longest side of a plane, in pixels."""
_GAP = 3
_LATTICE = 96
_BACKDROP = 18
_MAX_STRUCTURES = 250

Pixels = NDArray[np.uint8]
"""(rows, columns, 3) red, green, blue; row 0 is the top."""


def thumbnail(spec: DatasetSpec, case_id: str) -> bytes:
    """Draw the first channel of a case with the outlines of its labels, as PNG.

    The segmentation is laid over the image voxel by voxel; where the shapes differ it stands
    below it, alone. What cannot be read is left out.

    Returns:
        Empty if nothing can be read.
    """
    paths, segmentation = case_paths(spec, case_id)
    image = _image(paths[0]) if paths else None
    labels = None if segmentation is None else _label_map(segmentation)
    values = sorted(_values(spec))
    if image is None and labels is None:
        return b""
    if image is not None and labels is not None and image.array.shape[:3] == labels.array.shape:
        return png(_strip(image, labels.array, values))
    parts = [] if image is None else [_strip(image, None, values)]
    if labels is not None:
        blank = _Volume(np.zeros(labels.array.shape, np.uint8), labels.grid, labels.is_picture)
        parts.append(_strip(blank, labels.array, values))
    return png(_stacked(parts))


def png(pixels: Pixels) -> bytes:
    """Return a picture as a PNG file."""
    rows, columns = pixels.shape[:2]
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Volume:
    """An array and how it is shown."""

    array: NDArray[Any]
    """(I, J, K), or (I, J, K, 3) colours."""
    grid: Grid
    is_picture: bool
    """Whether rows and columns say nothing about left and right."""


def _placed(array: NDArray[Any], stored: Stored) -> _Volume:
    header = stored.header
    return _Volume(array, header.grid, header.nifti is None and header.itk is None)


def _image(path: Path) -> _Volume | None:
    """Return the first volume of an image file, or its colours; None if it cannot be read."""
    try:
        stored = in_colours(read_stored(path), path.name)
        is_coloured = stored.fourth == "colours" and stored.array.shape[-1] == 3
        is_single = stored.array.ndim == 3 or is_coloured
        return _placed(stored.array if is_single else stored.array[..., 0], stored)
    except (MedsegError, OSError):
        return None


def _label_map(path: Path) -> _Volume | None:
    try:
        stored = read_stored(path)
        single = stored if stored.array.ndim == 3 else one_channel(stored)
        values = None if single is None else as_integers(single)
        if values is None or isinstance(values, NotIntegers):
            return None
        return _placed(values, stored)
    except (MedsegError, OSError):
        return None


def _values(spec: DatasetSpec) -> set[int]:
    """Return the values of the labels, the background left out."""
    entries = (e if isinstance(e, tuple) else (e,) for e in spec.labels.values())
    background = spec.labels.get("background", 0)
    return {value for entry in entries for value in entry} - {background}


def _strip(volume: _Volume, labels: NDArray[Any] | None, values: list[int]) -> Pixels:
    """Draw the planes of a volume side by side."""
    image, spacing, indices = volume.array, volume.grid.spacing, _indexed(labels, values)
    if volume.is_picture:
        image = image[::-1, ::-1]
        indices = None if indices is None else indices[::-1, ::-1]
    else:
        axes, flips = canonical_axes(volume.grid.affine)
        spacing = reorient(volume.grid, axes, flips).spacing
        image = _turned(image, axes, flips)
        indices = None if indices is None else _turned(indices, axes, flips)
    shown = [p for p in PLANES if image.shape[p.across] > 1 and image.shape[p.up] > 1] or PLANES[:1]
    centre = _middle(image.shape) if indices is None else _centre(indices)
    longest = max(image.shape[a] * spacing[a] for p in shown for a in (p.across, p.up))
    grey = _grey(image)
    parts = [
        _picture(grey(plane.cut(image, centre)), indices, plane, centre, spacing, SIZE / longest)
        for plane in shown
    ]
    return _side_by_side(parts)


def _indexed(labels: NDArray[Any] | None, values: list[int]) -> NDArray[np.uint8] | None:
    """Return a label map whose structures are numbered 1, 2 ..., unexpected values last."""
    if labels is None:
        return None
    found = distinct_values(labels).tolist()
    background = [v for v in found if v not in values][:1] if 0 not in found else [0]
    order = [v for v in values if v in found]
    order += [v for v in found if v not in values and v not in background]
    numbers = {value: number for number, value in enumerate(order[:_MAX_STRUCTURES], start=1)}
    table = np.array([numbers.get(value, 0) for value in found], dtype=np.uint8)
    places = places_in(found, labels, np.min_scalar_type(len(found)))
    indices: NDArray[np.uint8] = values_at(table, places)
    return indices


def _turned(array: NDArray[Any], axes: tuple[int, ...], flips: tuple[bool, ...]) -> NDArray[Any]:
    view = array.transpose(*axes, *range(3, array.ndim))
    return np.flip(view, tuple(d for d, flip in enumerate(flips) if flip))


def _centre(indices: NDArray[np.uint8]) -> Voxel:
    """Return a voxel whose planes show the largest structure; found on a lattice if possible."""
    steps = [-(-length // _LATTICE) for length in indices.shape]
    coarse = indices[tuple(slice(step // 2, None, step) for step in steps)]
    if not coarse.any():
        return centre_of_largest(indices)
    i, j, k = (
        place * step + step // 2
        for place, step in zip(centre_of_largest(coarse), steps, strict=True)
    )
    return i, j, k


def _middle(shape: tuple[int, ...]) -> Voxel:
    i, j, k = (length // 2 for length in shape[:3])
    return i, j, k


def _grey(image: NDArray[Any]) -> Any:
    """Return a function from intensities to 8 bits, robust against a few extreme voxels."""
    steps = tuple(slice(None, None, -(-length // _LATTICE)) for length in image.shape[:3])
    sample = np.nan_to_num(image[steps].astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = np.percentile(sample, (0.5, 99.5)).tolist()
    if image.ndim == 4 and image.dtype == np.uint8:
        low, high = 0.0, 255.0
    high = high if high > low else low + 1

    def convert(picture: NDArray[Any]) -> Pixels:
        values = np.nan_to_num(picture.astype(np.float64), posinf=high, neginf=low)
        grey: Pixels = ((values - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
        return grey

    return convert


def _picture(
    grey: Pixels,
    indices: NDArray[np.uint8] | None,
    plane: Plane,
    centre: Voxel,
    spacing: tuple[float, float, float],
    scale: float,
) -> Pixels:
    """Return one plane in pixels of equal size.

    Args:
        grey: (up, across) or (up, across, 3), row 0 the bottom, as `Plane.cut` returns it.
        indices: Canonical label map, or None.
        plane: The plane.
        centre: Voxel it goes through.
        spacing: Of the canonical axes, in mm.
        scale: Pixels per mm.
    """
    across, up = plane.steps(spacing)
    rows = _sampled(grey.shape[0], up * scale)[::-1]
    columns = _sampled(grey.shape[1], across * scale)
    pixels = grey[np.ix_(rows, columns)]
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    if indices is not None:
        _outline(pixels, plane.cut(indices, centre)[np.ix_(rows, columns)])
    return pixels


def _sampled(length: int, pixels_per_voxel: float) -> NDArray[np.intp]:
    """Return which voxel each pixel shows."""
    count = max(1, round(length * pixels_per_voxel))
    return np.minimum(((np.arange(count) + 0.5) * length / count).astype(np.intp), length - 1)


def _outline(pixels: Pixels, indices: NDArray[np.uint8]) -> None:
    """Colour the pixels of each structure that touch another one."""
    padded = np.pad(indices, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = np.logical_or.reduce([other != inner for other in neighbours]) & (inner > 0)
    shades = np.array([[int(c[n : n + 2], 16) for n in (1, 3, 5)] for c in COLOURS], np.uint8)
    pixels[border] = shades[(inner[border].astype(np.intp) - 1) % len(shades)]


def _side_by_side(parts: list[Pixels]) -> Pixels:
    height = max(len(part) for part in parts)
    whole = []
    for part in parts:
        top = (height - len(part)) // 2
        space = ((top, height - len(part) - top), (0, _GAP), (0, 0))
        whole.append(np.pad(part, space, constant_values=_BACKDROP))
    joined: Pixels = np.concatenate(whole, axis=1)[:, :-_GAP]
    return joined


def _stacked(parts: list[Pixels]) -> Pixels:
    width = max(part.shape[1] for part in parts)
    whole = [
        np.pad(part, ((0, _GAP), (0, width - part.shape[1]), (0, 0)), constant_values=_BACKDROP)
        for part in parts
    ]
    joined: Pixels = np.concatenate(whole)[:-_GAP]
    return joined
