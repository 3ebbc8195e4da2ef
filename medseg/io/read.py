"""Read images and segmentations; whatever is wrong with a file becomes one clear error."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.colour import in_colours, one_channel
from medseg.io.image import (
    ENDINGS,
    NIFTI_ENDINGS,
    PICTURE_ENDINGS,
    TIFF_ENDINGS,
    Image,
    Stored,
    split_ending,
)
from medseg.io.integers import NotIntegers, as_integers, smallest_type

__all__ = [
    "ENDINGS", "empty", "read_channels", "read_image", "read_segmentation", "read_stored",
    "split_ending",
]  # fmt: skip

_SLAB_VOXELS = 2**20
"""Voxels scaled at a time, in double precision."""


def read_stored(path: str | Path) -> Stored:
    """Read a file as it is: values as stored, how they are scaled, where they lie.

    Returns:
        Array (I, J, K), or (I, J, K, N) where the file holds several values per voxel. A picture
        with a palette holds its indices.

    Raises:
        DatasetError: If the file cannot be read whole.
    """
    return _load(Path(path))


def read_image(path: str | Path) -> Image:
    """Read one image: a file, or a folder with the files of one DICOM series.

    Returns:
        Array (I, J, K) float32, scaled as the file says; a slice becomes (I, J, 1).

    Raises:
        DatasetError: If the file cannot be read whole, or holds NaN or infinite values, or several
            values per voxel.
    """
    stored = _load(Path(path))
    return image_of(stored, str(path))


def image_of(stored: Stored, origin: str) -> Image:
    """Return what a reader found as one image of intensities; see `read_image`."""
    grid = _grid(stored, origin)
    stored = in_colours(stored, origin)
    if stored.array.ndim != 3:
        raise _several_values(stored, origin)
    out = empty(grid.shape)
    _scale_into(out, stored.array, stored)
    _check_finite(out, stored, origin)
    return Image(array=out, grid=grid, header=stored.header)


def read_channels(paths: Sequence[str | Path]) -> Image:
    """Read the channels of one case.

    Args:
        paths: One file per channel; a file may also hold several, as colours or along its fourth
            axis. The channels of all files follow one another.

    Returns:
        Array (C, I, J, K) float32, with grid and header of the first file.

    Raises:
        DatasetError: If a file cannot be read whole, or holds NaN or infinite values.
        GeometryError: If the files do not share one grid.
    """
    if not paths:
        raise DatasetError("got no image files; expected one per channel")
    stored = in_colours(_load(Path(paths[0])), str(paths[0]))
    grid, header = _grid(stored, str(paths[0])), stored.header
    out, filled = empty(grid.shape, _num_channels(stored) + len(paths) - 1), 0
    for number, path in enumerate(paths):
        if number:
            del stored  # so that two files are never held at once
            stored = in_colours(_load(Path(path)), str(path))
            _check_same_grid(grid, _grid(stored, str(path)), paths[0], path)
            out = _with_room(out, filled, filled + _num_channels(stored) + len(paths) - number - 1)
        filled = _append(out, filled, stored, str(path))
    return Image(array=out, grid=grid, header=header)


def read_segmentation(path: str | Path) -> Image:
    """Read one label map.

    Returns:
        Array (I, J, K) of the smallest integer type that holds its values, unsigned if none is
        negative. Values within 1e-4 of an integer, as scaling leaves them, count as that integer.

    Raises:
        DatasetError: If the file cannot be read whole or holds several values per voxel, or a value
            is no integer or beyond 32 bits.
    """
    stored = _load(Path(path))
    grid = _grid(stored, str(path))
    if stored.array.ndim != 3:
        raise _several_values(stored, str(path), is_label=True)
    if stored.is_lossy:
        raise DatasetError(
            f"{path}: is a JPEG file, which changes the values at edges; expected a label map as "
            "it was drawn. Export it again as PNG."
        )
    labels = as_integers(stored)
    if isinstance(labels, NotIntegers):
        raise _no_labels(labels, stored.array.size, str(path))
    if labels.dtype != np.uint8:
        kind = smallest_type(int(labels.min()), int(labels.max()))
        labels = labels.astype(kind, copy=False)
    return Image(array=labels, grid=grid, header=stored.header)


def _no_labels(wrong: NotIntegers, size: int, path: str) -> DatasetError:
    """Return the error for values that are no labels."""
    if wrong.num_voxels > wrong.num_beyond:
        return DatasetError(
            f"{path}: {wrong.num_voxels - wrong.num_beyond} of {size} voxels are no integers (for "
            f"example {wrong.example:.6g}); expected label values. Is this the image, or was the "
            "segmentation interpolated? Export it again with nearest-neighbour interpolation."
        )
    return DatasetError(
        f"{path}: holds values from {wrong.low} to {wrong.high}; expected label values of 32 bits. "
        "Is this the image? Give the label map."
    )


def _slabs(array: NDArray[Any]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slabs along K that together are the array."""
    step = max(_SLAB_VOXELS // (array.shape[0] * array.shape[1]), 1)
    for start in range(0, array.shape[2], step):
        yield slice(None), slice(None), slice(start, start + step)


def _load(path: Path) -> Stored:
    """Check that there is a file, and hand it to the reader of its format."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            from medseg.io import dicom

            return dicom.read(path)
        reader = _reader(split_ending(path.name)[1])
        if status.st_size == 0:
            raise DatasetError(f"{path}: the file is empty (0 bytes). Copy or export it again.")
        return reader(path)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file. Check the name, or add the file.") from None
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file and its access "
            "rights."
        ) from None


def _reader(ending: str) -> Callable[[Path], Stored]:
    """Return the function that reads a format; its library is imported only now."""
    if ending in NIFTI_ENDINGS:
        from medseg.io import nifti

        return nifti.read
    if ending in PICTURE_ENDINGS:
        from medseg.io import picture

        return picture.read
    if ending in TIFF_ENDINGS:
        from medseg.io import tiff

        return tiff.read
    from medseg.io import sitk

    return sitk.read


def _grid(stored: Stored, origin: str) -> Grid:
    try:
        return stored.header.grid
    except GeometryError as error:
        raise GeometryError(f"{origin}: {error}. Correct the header of the file.") from None


def _several_values(stored: Stored, origin: str, *, is_label: bool = False) -> DatasetError:
    """Return the error for a file of several values per voxel where one was expected."""
    *_, count = stored.array.shape
    if stored.fourth == "series":
        return DatasetError(
            f"{origin}: holds a series of {count} volumes, shape {stored.array.shape}; expected "
            "one volume (I, J, K). Save one volume per file."
        )
    what = "an RGB label" if stored.fourth == "colours" else f"{count} channels"
    if not is_label:
        return DatasetError(
            f"{origin}: holds several values per voxel ({count}, shape {stored.array.shape}); "
            "expected one. Convert it to one file per channel."
        )
    if one_channel(stored) is not None:
        advice = (
            "All channels are equal, so one of them is the label map: `medseg dataset check --fix` "
            "writes it."
        )
    else:
        advice = "Save it with one integer per voxel: grey, or a palette whose indices are labels."
    return DatasetError(
        f"{origin}: is {what}: it holds {count} values per voxel, shape {stored.array.shape}; "
        f"expected one label value. {advice}"
    )


def _check_same_grid(first: Grid, grid: Grid, path_first: str | Path, path: str | Path) -> None:
    difference = first.disagreement(grid)
    if difference is not None:
        raise GeometryError(
            f"{path} does not lie on the grid of {path_first}: {difference}. "
            "All channels of a case must share one grid: resample this channel to the first."
        )


def _num_channels(stored: Stored) -> int:
    return int(stored.array.shape[3]) if stored.array.ndim == 4 else 1


def _append(out: NDArray[np.float32], filled: int, stored: Stored, path: str) -> int:
    """Write the channels of one file behind those that are there; return how many there are."""
    if stored.array.ndim == 3:
        _scale_into(out[filled], stored.array, stored)
        _check_finite(out[filled], stored, path)
        return filled + 1
    count = _num_channels(stored)
    for number in range(count):
        channel = out[filled + number]
        _scale_into(channel, stored.array[..., number], stored)
        _check_finite(channel, stored, f"{path} (channel {number})")
    return filled + count


def _with_room(out: NDArray[np.float32], filled: int, num_channels: int) -> NDArray[np.float32]:
    """Return an array for so many channels, those that are filled in place."""
    if len(out) == num_channels:
        return out
    i, j, k = out.shape[1:]
    larger = empty((i, j, k), num_channels)
    larger[:filled] = out[:filled]
    return larger


def empty(shape: Sequence[int], *lead: int) -> NDArray[np.float32]:
    """Return an array (*lead, I, J, K) whose memory runs along I first, as files do."""
    axes = (*range(len(lead)), *(len(lead) + axis for axis in (2, 1, 0)))
    return np.empty((*lead, *shape[::-1]), dtype=np.float32).transpose(axes)


def _scale_into(out: NDArray[np.float32], array: NDArray[Any], stored: Stored) -> None:
    """Write scaled values, computed in double precision where the file asks for scaling."""
    with np.errstate(over="ignore", invalid="ignore"):
        if (stored.slope, stored.inter) == (1.0, 0.0):
            out[...] = array
            return
        for rows in _slabs(array):
            out[rows] = array[rows] * np.float64(stored.slope) + stored.inter


def _check_finite(array: NDArray[np.float32], stored: Stored, origin: str) -> None:
    if stored.array.dtype.kind in "iu" and (stored.slope, stored.inter) == (1.0, 0.0):
        return
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if np.isfinite(total):
        return
    num_nan, num_inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    raise DatasetError(
        f"{origin}: {num_nan} voxels are NaN and {num_inf} infinite (of {array.size}, as 32-bit "
        "floats); expected finite intensities. Replace them, for instance by 0."
    )
