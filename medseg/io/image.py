"""Images in memory, and what is remembered of a file so that an output gets its exact geometry."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.geometry import Affine, Grid

NIFTI_ENDINGS = (".nii.gz", ".nii", ".hdr", ".img")
"""Endings read and written as NIfTI; `.hdr` and `.img` are the two files of one image."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp")
"""Endings of flat pictures in grey or colour."""
TIFF_ENDINGS = (".tif", ".tiff")
"""Endings of TIFF files: pictures, and stacks of them."""
ENDINGS = (
    *NIFTI_ENDINGS, ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", *PICTURE_ENDINGS, *TIFF_ENDINGS
)  # fmt: skip
"""Endings of the image files medseg knows, the longest of a family first."""

_CHANNEL_SUFFIX = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)


def split_ending(name: str) -> tuple[str, str]:
    """Split a file name into stem and known ending, the ending in lower case.

    Raises:
        DatasetError: If the ending is unknown.

    Examples:
        >>> split_ending("patient_07.T1.nii.gz")
        ('patient_07.T1', '.nii.gz')
    """
    for ending in ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)], ending
    raise DatasetError(
        f"{name!r} has an unknown ending; expected one of: {', '.join(ENDINGS)}. "
        "Convert the image to one of these formats."
    )


def split_channel(stem: str) -> tuple[str, int | None]:
    """Return case and channel number of `CASE_NNNN`, or the stem and None.

    Examples:
        >>> split_channel("a_12_0003"), split_channel("a_12")
        (('a_12', 3), ('a_12', None))
    """
    match = _CHANNEL_SUFFIX.fullmatch(stem)
    return (match["case"], int(match["channel"])) if match else (stem, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiGeometry:
    """The fields of a NIfTI header that place the image, as they stand in the file."""

    version: int
    """1 or 2."""
    pixdim: tuple[float, ...]
    """Eight entries: handedness of the quaternion, then voxel size and time step."""
    xyzt_units: int
    """Units of space and time, packed."""
    qform_code: int
    sform_code: int
    quaternion: tuple[float, ...]
    """b, c, d of the qform."""
    offset: tuple[float, ...]
    """Translation of the qform."""
    sform: tuple[tuple[float, ...], ...]
    """(3, 4) rows of the sform."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItkGeometry:
    """The geometry of an ITK image, in ITK's own terms (LPS, mm)."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


_ROUNDING = 1e-6
"""Relative difference that 32-bit numbers of a header explain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Whatever is needed to write an output with exactly the geometry of its input."""

    shape: tuple[int, ...]
    """Shape as stored: two axes for a slice, more than three where the last have length 1."""
    affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxel index to RAS+ mm."""
    ending: str = ".nii.gz"
    """Ending of the file, with the dot."""
    nifti: NiftiGeometry | None = None
    """Present where the image came from a NIfTI file."""
    itk: ItkGeometry | None = None
    """Present where the image came through ITK."""
    has_spacing: bool = True
    """False for pictures of which nothing tells how large a pixel is; 1 mm is assumed then."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along I, J, K, to the last digit as the file says it.

        The lengths of the affine's columns differ from that by rounding; where they differ by
        more, as with other units, they count.
        """
        found = self.grid.spacing
        stored: tuple[float, ...] = ()
        if self.nifti is not None:
            stored = tuple(float(np.float32(value)) for value in self.nifti.pixdim[1:4])
        elif self.itk is not None:
            stored = self.itk.spacing[:3]
        said = tuple(
            value if abs(value / length - 1) < _ROUNDING else length
            for value, length in zip(stored, found, strict=False)
        )
        i, j, k = (*said, *found[len(said) :])
        return i, j, k

    @classmethod
    def of_grid(cls, grid: Grid) -> Header:
        """Return the header of a new image on a grid."""
        return cls(shape=grid.shape, affine=plain(grid.affine))

    @property
    def grid(self) -> Grid:
        """The grid (I, J, K) of the image.

        Raises:
            GeometryError: If shape and affine make no grid.
        """
        i, j, k = (*self.shape, 1, 1)[:3]
        return Grid((i, j, k), np.array(self.affine))


def plain(matrix: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    """Return a matrix as tuples of floats."""
    return tuple(tuple(float(value) for value in row) for row in matrix)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Image:
    """An array and where it lies."""

    array: NDArray[Any]
    """(I, J, K), or (C, I, J, K) where several channels were read."""
    grid: Grid
    header: Header

    @property
    def affine(self) -> Affine:
        """(4, 4) voxel index to RAS+ mm."""
        return self.grid.affine


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stored:
    """What a reader finds: values as stored, and how to scale them."""

    array: NDArray[Any]
    """(I, J, K), or (I, J, K, N) where the file holds several values per voxel; any real type and
    byte order."""
    header: Header
    slope: float = 1.0
    inter: float = 0.0
    fourth: Literal["series", "colours", "values"] = "series"
    """What the fourth axis holds, if there is one: volumes, red, green and blue, or other values
    of one voxel."""
    palette: NDArray[np.uint8] | None = None
    """(n, 4) red, green, blue and opacity of each value, where a picture has a palette."""
    is_lossy: bool = False
    """Whether the format changes values, as JPEG does."""


def unreadable(path: Path, found: str, expected: str = "") -> DatasetError:
    """Return the error for a damaged file.

    Args:
        path: The file.
        found: What is wrong.
        expected: What it should be, if that says more.
    """
    expectation = f"; expected {expected}" if expected else ""
    return DatasetError(
        f"{path}: {found}{expectation}. The file is damaged or was not copied whole: "
        "copy or export it again."
    )


def check_length(path: Path, found: int, expected: int) -> None:
    """Check that a file holds the bytes its header promises, no fewer and no more.

    Raises:
        DatasetError: If it does not.
    """
    if found < expected:
        raise unreadable(
            path, f"{expected - found} of {expected} bytes of voxel data are missing (cut short)"
        )
    if found > expected:
        raise unreadable(
            path,
            f"{found - expected} bytes follow the voxel data",
            f"the {expected} bytes of voxel data its header promises",
        )
