"""Read images and segmentations; whatever is wrong with a file becomes one clear error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.image import ENDINGS, NIFTI_ENDINGS, Image, Stored, split_ending

__all__ = ["ENDINGS", "read_channels", "read_image", "read_segmentation", "split_ending"]

_INTEGER_TOLERANCE = 1e-4


def read_image(path: str | Path) -> Image:
    """Read one image.

    Returns:
        Array (I, J, K) float32, scaled as the file says; a slice becomes (I, J, 1).

    Raises:
        DatasetError: If the file cannot be read whole, or holds NaN or infinite values.
    """
    stored = _load(Path(path))
    return image_of(stored, str(path))


def image_of(stored: Stored, origin: str) -> Image:
    """Return what a reader found as one image of intensities; see `read_image`."""
    grid = _grid(stored, origin)
    _check_volume(stored, origin)
    out = _empty(grid.shape)
    _scale_into(out, stored.array, stored)
    _check_finite(out, origin)
    return Image(array=out, grid=grid, header=stored.header)


def read_channels(paths: Sequence[str | Path]) -> Image:
    """Read the channels of one case.

    Args:
        paths: One file per channel; or one file that holds the channels along its fourth axis.

    Returns:
        Array (C, I, J, K) float32, with grid and header of the first file.

    Raises:
        DatasetError: If a file cannot be read whole, or holds NaN or infinite values.
        GeometryError: If the files do not share one grid.
    """
    if not paths:
        raise DatasetError("got no image files; expected one per channel")
    stored = _load(Path(paths[0]))
    grid = _grid(stored, str(paths[0]))
    if len(paths) == 1 and stored.array.ndim == 4:
        return _stack(stored, grid, str(paths[0]))
    _check_volume(stored, str(paths[0]))
    header = stored.header
    out = _empty(grid.shape, len(paths))
    for number, path in enumerate(paths):
        if number:
            stored = _load(Path(path))
            _check_volume(stored, str(path))
            _check_same_grid(grid, _grid(stored, str(path)), paths[0], path)
        _scale_into(out[number], stored.array, stored)
        _check_finite(out[number], str(path))
    return Image(array=out, grid=grid, header=header)


def read_segmentation(path: str | Path) -> Image:
    """Read one label map.

    Returns:
        Array (I, J, K) of the smallest unsigned integer type that holds its values. Values within
        1e-4 of an integer, as scaling leaves them, count as that integer.

    Raises:
        DatasetError: If the file cannot be read whole, or a value is negative or no integer.
    """
    stored = _load(Path(path))
    grid = _grid(stored, str(path))
    _check_volume(stored, str(path))
    array = stored.array
    if array.dtype.kind == "f" or (stored.slope, stored.inter) != (1.0, 0.0):
        array = _integers(array * np.float64(stored.slope) + stored.inter, str(path))
    smallest, largest = array.min(), array.max()
    if smallest < 0:
        count = int(np.count_nonzero(array < 0))
        raise DatasetError(
            f"{path}: {count} of {array.size} voxels are negative (smallest {smallest:g}); "
            "expected label values from 0 up. Replace them, for instance by the ignore label."
        )
    labels = array.astype(np.min_scalar_type(int(largest)), copy=False)
    return Image(array=labels, grid=grid, header=stored.header)


def _integers(values: NDArray[np.float64], path: str) -> NDArray[np.float64]:
    rounded = np.rint(values)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(values - rounded) <= _INTEGER_TOLERANCE)
    count = int(np.count_nonzero(wrong))
    if count:
        raise DatasetError(
            f"{path}: {count} of {values.size} voxels are no integers (for example "
            f"{values[wrong][0]:.6g}); expected label values. Is this the image, or was the "
            "segmentation interpolated? Export it again with nearest-neighbour interpolation."
        )
    return rounded


def _load(path: Path) -> Stored:
    """Check that there is a file, and hand it to the reader of its format."""
    if path.is_dir():
        raise DatasetError(f"{path}: is a folder; expected an image file. Give the file itself.")
    if not path.exists():
        raise DatasetError(f"{path}: no such file. Check the name, or add the file.")
    _, ending = split_ending(path.name)
    try:
        if path.stat().st_size == 0:
            raise DatasetError(f"{path}: the file is empty (0 bytes). Copy or export it again.")
        if ending in NIFTI_ENDINGS:
            from medseg.io import nifti

            return nifti.read(path)
        from medseg.io import sitk

        return sitk.read(path)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file and its access "
            "rights."
        ) from None


def _grid(stored: Stored, origin: str) -> Grid:
    try:
        return stored.header.grid
    except GeometryError as error:
        raise GeometryError(f"{origin}: {error}. Correct the header of the file.") from None


def _check_volume(stored: Stored, origin: str) -> None:
    if stored.array.ndim != 3:
        raise DatasetError(
            f"{origin}: holds a series of {stored.array.shape[3]} volumes, shape "
            f"{stored.array.shape}; expected one volume (I, J, K). Save one volume per file."
        )


def _check_same_grid(first: Grid, grid: Grid, path_first: str | Path, path: str | Path) -> None:
    difference = first.disagreement(grid)
    if difference is not None:
        raise GeometryError(
            f"{path} does not lie on the grid of {path_first}: {difference}. "
            "All channels of a case must share one grid: resample this channel to the first."
        )


def _stack(stored: Stored, grid: Grid, path: str) -> Image:
    """Return the volumes of one file as channels."""
    out = _empty(grid.shape, stored.array.shape[3])
    for number, channel in enumerate(out):
        _scale_into(channel, stored.array[..., number], stored)
        _check_finite(channel, f"{path} (channel {number})")
    return Image(array=out, grid=grid, header=stored.header)


def _empty(shape: tuple[int, ...], *lead: int) -> NDArray[np.float32]:
    """Return an array (*lead, I, J, K) whose memory runs along I first, as files do."""
    axes = (*range(len(lead)), *(len(lead) + axis for axis in (2, 1, 0)))
    return np.empty((*lead, *shape[::-1]), dtype=np.float32).transpose(axes)


def _scale_into(out: NDArray[np.float32], array: NDArray[Any], stored: Stored) -> None:
    """Write scaled values, computed in double precision where the file asks for scaling."""
    with np.errstate(over="ignore", invalid="ignore"):
        if (stored.slope, stored.inter) == (1.0, 0.0):
            out[...] = array
            return
        for k in range(array.shape[2]):
            out[:, :, k] = array[:, :, k] * np.float64(stored.slope) + stored.inter


def _check_finite(array: NDArray[np.float32], origin: str) -> None:
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if np.isfinite(total):
        return
    num_nan, num_inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    raise DatasetError(
        f"{origin}: {num_nan} voxels are NaN and {num_inf} infinite (of {array.size}, as 32-bit "
        "floats); expected finite intensities. Replace them, for instance by 0."
    )
