"""Write images: whole or not at all, with exactly the geometry of their input."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.geometry import Grid
from medseg.io.image import NIFTI_ENDINGS, PICTURE_ENDINGS, TIFF_ENDINGS, Header, split_ending
from medseg.io.spacing import side_file

_ORDER = {".json": -1, ".hdr": 1, ".mhd": 1, ".nhdr": 1}
"""Voxel sizes are put in place before the image, headers after the data they name."""
_WITHOUT_LOSS = {".jpg": ".png", ".jpeg": ".png"}


def output_ending(ending: str) -> str:
    """Return the ending of a label map that belongs to an image: the same, but without loss.

    Examples:
        >>> output_ending(".jpg"), output_ending(".nii.gz")
        ('.png', '.nii.gz')
    """
    return _WITHOUT_LOSS.get(ending, ending)


def write_segmentation(path: str | Path, array: NDArray[Any], header: Header) -> None:
    """Write a label map, unscaled.

    Args:
        path: Its ending decides the format; the folder is made if missing.
        array: (I, J, K) integers, written in their own type; pictures take the smallest of theirs.
        header: Header of the image it belongs to.

    Raises:
        GeometryError: If the format cannot hold the image's geometry.
        DatasetError: If the ending is unknown, or the format cannot hold the values without loss.
    """
    if array.dtype.kind not in "ui":
        raise TypeError(f"a segmentation holds integers, got {array.dtype}")
    _write(Path(path), array, header)


def write_image(path: str | Path, array: NDArray[Any], header: Header) -> None:
    """Write intensities, unscaled.

    Args:
        path: Its ending decides the format; the folder is made if missing.
        array: (I, J, K) real numbers, written in their own type.
        header: Geometry, such as that of the image they came from.

    Raises:
        GeometryError: If the format cannot hold the geometry.
        DatasetError: If the ending is unknown, or the format cannot hold the values.
    """
    _write(Path(path), array, header)


def write_map(path: str | Path, array: NDArray[Any], header: Header) -> None:
    """Write a map of real numbers as float32, such as one label's probability.

    Args:
        path: Its ending decides the format; the folder is made if missing.
        array: (I, J, K).
        header: Header of the image it belongs to.

    Raises:
        GeometryError: If the format cannot hold the image's geometry.
        DatasetError: If the ending is unknown.
    """
    _write(Path(path), np.asarray(array, dtype=np.float32), header)


def write_nifti(path: str | Path, array: NDArray[Any], affine: ArrayLike) -> None:
    """Write a new image, in the type of its array.

    Args:
        path: Its ending decides the format; the folder is made if missing.
        array: (I, J, K) real numbers.
        affine: (4, 4) voxel index to RAS+ mm; becomes sform and qform with code 1 (scanner).

    Raises:
        GeometryError: If the affine places no image, or the format cannot hold it.
        DatasetError: If the ending is unknown.
    """
    i, j, k = array.shape
    grid = Grid((i, j, k), np.asarray(affine, dtype=np.float64))
    _write(Path(path), array, Header.of_grid(grid))


def _write(path: Path, array: NDArray[Any], header: Header) -> None:
    if array.shape != header.grid.shape:
        raise ValueError(f"array has shape {array.shape}; expected {header.grid.shape}")
    _, ending = split_ending(path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        _write_into(folder / path.name, array, header, ending)
        _write_spacing(folder, path, header, ending)
        for part in sorted(folder.iterdir(), key=lambda part: _ORDER.get(part.suffix.lower(), 0)):
            _flush(part)
            os.replace(part, path.parent / part.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_into(path: Path, array: NDArray[Any], header: Header, ending: str) -> None:
    if ending in NIFTI_ENDINGS:
        from medseg.io import nifti

        nifti.write(path, array, header)
    elif ending in PICTURE_ENDINGS:
        from medseg.io import picture

        picture.write(path, array, header)
    elif ending in TIFF_ENDINGS:
        from medseg.io import tiff

        tiff.write(path, array, header)
    else:
        from medseg.io import sitk

        sitk.write(path, array, header)


def _write_spacing(folder: Path, path: Path, header: Header, ending: str) -> None:
    """Write the file that gives the voxel size of a picture or stack, where it needs one."""
    if ending in PICTURE_ENDINGS or ending in TIFF_ENDINGS:
        content = side_file(path, header)
        if content is not None:
            (folder / f"{split_ending(path.name)[0]}.json").write_text(content, encoding="utf-8")


def _flush(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
