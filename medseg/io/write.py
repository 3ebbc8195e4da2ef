"""Write images: whole or not at all, with exactly the geometry of their input."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import DatasetError
from medseg.geometry import Grid
from medseg.io.image import NIFTI_ENDINGS, PICTURE_ENDINGS, TIFF_ENDINGS, Header, split_ending
from medseg.io.names import LabelEntry, label_extension
from medseg.io.space import full_disk_named
from medseg.io.spacing import side_file

_ORDER = {".json": -1, ".hdr": 1, ".mhd": 1, ".nhdr": 1}
"""Voxel sizes are put in place before the image, headers after the data they name."""
SHARE_STEP = 1 / 65535
"""What one step of a stored share is."""
_WITHOUT_LOSS = {".jpg": ".png", ".jpeg": ".png"}


def output_ending(ending: str) -> str:
    """Return the ending of a label map that belongs to an image: the same, but without loss.

    Examples:
        >>> output_ending(".jpg"), output_ending(".nii.gz")
        ('.png', '.nii.gz')
    """
    return _WITHOUT_LOSS.get(ending, ending)


def write_segmentation(
    path: str | Path,
    array: NDArray[Any],
    header: Header,
    *,
    labels: Sequence[LabelEntry] = (),
) -> None:
    """Write a label map, unscaled.

    Args:
        path: Its ending decides the format; the folder is made if missing.
        array: (I, J, K) integers, written in their own type; pictures take the smallest of theirs.
        header: Header of the image it belongs to.
        labels: Names and colours of the values; `.nii` and `.nii.gz` carry them in their header,
            other formats go without.

    Raises:
        GeometryError: If the format cannot hold the image's geometry.
        DatasetError: If the ending is unknown, the format cannot hold the values without loss, or
            the disk is full.
    """
    if array.dtype.kind not in "ui":
        raise TypeError(f"a segmentation holds integers, got {array.dtype}")
    _write(Path(path), array, header, labels)


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


def write_shares(path: str | Path, array: NDArray[Any], header: Header) -> None:
    """Write a map of numbers from 0 to 1 in two bytes each, as NIfTI.

    They are stored in steps of 1/65535, with the factor in the header that every reader applies.

    Args:
        path: `.nii` or `.nii.gz`; the folder is made if missing.
        array: (I, J, K), from 0 to 1, what lies beyond is cut off; or uint16 from `as_shares`.
        header: Header of the image it belongs to.

    Raises:
        DatasetError: If the ending is another one, or the disk is full.
    """
    path = Path(path)
    if split_ending(path.name)[1] not in (".nii.gz", ".nii"):
        raise DatasetError(f"{path}: maps of shares are written as .nii or .nii.gz; name it so.")
    shares = array if array.dtype == np.uint16 else as_shares(array)
    _write(path, shares, header, slope=SHARE_STEP)


def as_shares(values: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Return numbers from 0 to 1 as the nearest multiples of `SHARE_STEP`.

    Examples:
        >>> as_shares(np.array([-0.1, 0.25, 1.0])).tolist()
        [0, 16384, 65535]
    """
    scaled = np.array(values, dtype=np.float32)
    scaled *= 65535
    np.clip(scaled, 0, 65535, out=scaled)
    result: NDArray[np.uint16] = np.rint(scaled, out=scaled).astype(np.uint16)
    return result


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


def _write(
    path: Path,
    array: NDArray[Any],
    header: Header,
    labels: Sequence[LabelEntry] = (),
    slope: float = 1.0,
) -> None:
    if array.shape != header.grid.shape:
        raise ValueError(f"array has shape {array.shape}; expected {header.grid.shape}")
    _, ending = split_ending(path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_named(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            if ending in NIFTI_ENDINGS:
                _write_nifti(folder / path.name, array, header, labels, slope)
            else:
                _write_other(folder / path.name, array, header, ending)
            _write_spacing(folder, path, header, ending)
            for part in sorted(folder.iterdir(), key=_order):
                _flush(part)
                os.replace(part, path.parent / part.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _order(part: Path) -> int:
    return _ORDER.get(part.suffix.lower(), 0)


def _write_nifti(
    path: Path,
    array: NDArray[Any],
    header: Header,
    labels: Sequence[LabelEntry],
    slope: float,
) -> None:
    from medseg.io import nifti

    extension = label_extension(labels) if labels else b""
    nifti.write(path, array, header, slope=slope, extension=extension)


def _write_other(path: Path, array: NDArray[Any], header: Header, ending: str) -> None:
    if ending in PICTURE_ENDINGS:
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
