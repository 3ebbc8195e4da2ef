"""The many ways to hand over one case, brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError, GeometryError
from medseg.geometry import Grid
from medseg.io.convert import from_object
from medseg.io.image import Header, Image, split_channel
from medseg.io.read import read_channels, read_image, read_segmentation, split_ending
from medseg.io.size import stored_bytes

Case = Any
"""Path | list of paths or image objects, one per channel | (array CIJK or IJK, affine) |
SimpleITK image | nibabel image."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Source:
    """One case, read."""

    name: str
    channels: NDArray[np.float32]
    """(C, I, J, K) intensities as stored."""
    grid: Grid
    header: Header
    """Header of the first channel; a plain one for a bare array."""


def case_name(case: Case, fallback: str = "case") -> str:
    """Return the name of a case: its (first) file's stem without _NNNN, else `fallback`.

    Examples:
        >>> case_name(["scans/anna_0000.nii.gz", "scans/anna_0001.nii.gz"])
        'anna'
    """
    first = case[0] if isinstance(case, (list, tuple)) and len(case) else case
    if not isinstance(first, (str, Path)):
        return fallback
    name = Path(first).name
    try:
        stem, _ = split_ending(name)
    except DatasetError:
        return name
    return split_channel(stem)[0]


_READ_COPIES = 3
"""What reading takes, as a multiple of the stored image (16 bits a voxel, read as 32)."""


def bytes_in_memory(case: Case) -> float:
    """Return roughly what reading a case takes; 0 for what is in memory already."""
    parts = case if isinstance(case, (list, tuple)) else [case]
    paths = [Path(part) for part in parts if isinstance(part, (str, Path))]
    return float(_READ_COPIES * sum(map(stored_bytes, paths)))


def read_case(case: Case, name: str) -> Source:
    """Read a case, whatever form it was handed over in.

    Args:
        case: See `Case`.
        name: How messages call it.

    Raises:
        DatasetError: If a file cannot be read or an array is not an image.
        GeometryError: If channels do not share one grid.
        TypeError: If `case` is none of the known forms.
    """
    if _is_array_pair(case):
        return _from_array(case[0], case[1], name)
    parts = list(case) if isinstance(case, (list, tuple)) else [case]
    if not parts:
        raise DatasetError(f"case {name!r}: got an empty list; expected one entry per channel.")
    if all(isinstance(part, (str, Path)) for part in parts):
        image = read_channels([Path(part) for part in parts])
        return Source(name=name, channels=image.array, grid=image.grid, header=image.header)
    return _stack([_read_part(part) for part in parts], name)


def read_label_map(case: Case, source: Source) -> NDArray[np.integer[Any]]:
    """Read a label map that lies on the grid of a case.

    Args:
        case: A path, an array (I, J, K) or an image object.
        source: The case.

    Returns:
        (I, J, K) integers, with the values of files.

    Raises:
        DatasetError: If it cannot be read or holds other numbers than integers.
        GeometryError: If it lies on another grid.
    """
    where = f"case {source.name!r}: the label map of the previous stage"
    grid: Grid | None
    if isinstance(case, (str, Path)):
        image = read_segmentation(Path(case))
        array, grid = image.array, image.grid
    elif isinstance(case, np.ndarray):
        array = _integers(case, where)
        grid = Grid(case.shape[:3], source.grid.affine) if case.ndim == 3 else None
    else:
        part = _read_part(case)
        array, grid = _integers(part.array, where), part.grid
    if grid is None or (difference := source.grid.disagreement(grid)) is not None:
        found = f"it has shape {array.shape}" if grid is None else difference
        raise GeometryError(
            f"{where} does not lie on the grid of the image: {found}. Resample it to the image."
        )
    found_map: NDArray[np.integer[Any]] = array
    return found_map


def _integers(array: NDArray[Any], where: str) -> NDArray[np.integer[Any]]:
    """Return whole numbers as integers."""
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    whole = np.rint(array)
    if array.dtype.kind != "f" or not np.array_equal(whole, array):
        raise DatasetError(f"{where} holds values that are no integers; expected label values.")
    result: NDArray[np.integer[Any]] = whole.astype(np.int64)
    return result


def _is_array_pair(case: Case) -> bool:
    return isinstance(case, tuple) and len(case) == 2 and isinstance(case[0], np.ndarray)


def _from_array(array: NDArray[Any], affine: Any, name: str) -> Source:
    """Check (array, affine) and bring it to (C, I, J, K)."""
    if array.ndim not in (3, 4) or 0 in array.shape or array.dtype.kind not in "buif":
        raise DatasetError(
            f"case {name!r}: array is {array.dtype} {array.shape}; expected real numbers of shape "
            "(I, J, K) or (C, I, J, K)."
        )
    channels = np.asarray(array, dtype=np.float32)
    bad = int(np.count_nonzero(~np.isfinite(channels)))
    if bad:
        raise DatasetError(
            f"case {name!r}: {bad} voxels are NaN or infinite; expected finite intensities. "
            "Replace them before prediction."
        )
    channels = channels[np.newaxis] if channels.ndim == 3 else channels
    grid = Grid(shape=(channels.shape[1], channels.shape[2], channels.shape[3]), affine=affine)
    return Source(name=name, channels=channels, grid=grid, header=Header.of_grid(grid))


def _read_part(part: Any) -> Image:
    if isinstance(part, (str, Path)):
        return read_image(Path(part))
    image = from_object(part)
    if image is None:
        raise TypeError(
            f"got a {type(part).__module__}.{type(part).__qualname__}; expected a path, a list of "
            "paths or image objects (one per channel), a tuple (array, affine), a SimpleITK image "
            "or a nibabel image"
        )
    return image


def _stack(images: Sequence[Image], name: str) -> Source:
    first = images[0]
    for number, image in enumerate(images[1:], start=1):
        difference = first.grid.disagreement(image.grid)
        if difference is not None:
            raise GeometryError(
                f"case {name!r}: channel {number} does not lie on the grid of channel 0: "
                f"{difference}. Resample the channels to one grid."
            )
    channels = np.stack([image.array for image in images]).astype(np.float32, copy=False)
    return Source(name=name, channels=channels, grid=first.grid, header=first.header)
