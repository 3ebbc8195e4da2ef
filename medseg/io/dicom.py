"""DICOM series: the files of a folder that together are one volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.io.dicom_header import DicomHeader, is_dicom, read_header
from medseg.io.dicom_pixels import Pixels, read_pixels
from medseg.io.dicom_stack import in_order, stack
from medseg.io.image import Stored

__all__ = ["DicomHeader", "Series", "find_series", "is_dicom_folder", "read", "read_series"]

_LOOKED_AT = 16
"""Files looked at to tell whether a folder holds DICOM."""
_SERIES_UID, _DESCRIPTION, _MODALITY = 0x0020000E, 0x0008103E, 0x00080060


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The image files of one series in one folder."""

    folder: Path
    uid: str
    """SeriesInstanceUID, empty where the files have none."""
    description: str
    """SeriesDescription, empty where the files have none."""
    modality: str
    """CT, MR, PT ..."""
    headers: tuple[DicomHeader, ...]
    """One per file, along the normal of the slices; by name where a position is missing."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in the order of `headers`."""
        return tuple(header.path for header in self.headers)

    @property
    def num_slices(self) -> int:
        """Slices in all files together."""
        return sum(header.num_frames for header in self.headers)


def is_dicom_folder(folder: str | Path) -> bool:
    """Return whether a folder directly holds DICOM files; only its first few files are opened.

    Raises:
        DatasetError: If the folder or one of these files may not be opened.
    """
    files = [path for path in _files(Path(folder)) if path.name.upper() != "DICOMDIR"]
    return any(_is_dicom(path) for path in files[:_LOOKED_AT])


def find_series(folder: str | Path) -> tuple[Series, ...]:
    """Return the image series that lie directly in a folder, by description and UID.

    DICOM files are known by their content, whatever their names; all others are passed over, and
    DICOM files that are no images (DICOMDIR, reports, segmentations).

    Raises:
        DatasetError: If there is no such folder, or a DICOM file in it is damaged or encoded in a
            way that cannot be read.
    """
    folder = Path(folder)
    found: dict[str, list[DicomHeader]] = {}
    for path in _files(folder):
        header = read_header(path) if _is_dicom(path) else None
        if header is not None:
            found.setdefault(header.text(_SERIES_UID), []).append(header)
    series = [
        Series(
            folder=folder,
            uid=uid,
            description=headers[0].text(_DESCRIPTION),
            modality=headers[0].text(_MODALITY),
            headers=in_order(headers),
        )
        for uid, headers in found.items()
    ]
    return tuple(sorted(series, key=lambda one: (one.description, one.uid)))


def read(folder: Path) -> Stored:
    """Read the one series of a folder; see `read_series`.

    Raises:
        DatasetError: If the folder holds no series or several, or its files cannot be read.
        GeometryError: If its slices make no even stack.
    """
    found = find_series(folder)
    if not found:
        raise _no_series(folder)
    if len(found) > 1:
        lines = "".join(f"\n  {_words(one)}" for one in found)
        raise DatasetError(
            f"{folder}: holds {len(found)} DICOM series; expected one. Move each into a folder of "
            f"its own and give that folder:{lines}"
        )
    return read_series(found[0])


def read_series(series: Series) -> Stored:
    """Read a series as one volume.

    Returns:
        Array (I, J, K): columns, rows, slices along their normal. Values as stored where all slices
        are scaled alike, else scaled, as float32.

    Raises:
        DatasetError: If a file cannot be read, or holds colours or several frames.
        GeometryError: If the slices make no even stack: one is missing, doubled, turned or of
            another size, or the stack leans (gantry tilt).
    """
    header, ordered = stack(series.folder, series.headers)
    pixels = [read_pixels(one) for one in ordered]
    scales = {(one.slope, one.inter) for one in pixels}
    if len(scales) > 1:
        return Stored(array=_scaled(pixels), header=header)
    ((slope, inter),) = scales
    return Stored(array=_as_stored(pixels), header=header, slope=slope, inter=inter)


def _files(folder: Path) -> list[Path]:
    """Return the plain files of a folder by name, hidden ones left out."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(
            f"{folder}: cannot be read ({error.strerror}); expected a folder with the files of a "
            "DICOM series. Check the name and its access rights."
        ) from None
    return [path for path in entries if not path.name.startswith(".") and path.is_file()]


def _is_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read ({error.strerror}). Check the file and its access rights."
        ) from None


def _no_series(folder: Path) -> DatasetError:
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    with_dicom = [path.name for path in inside if is_dicom_folder(path)]
    if with_dicom:
        return DatasetError(
            f"{folder}: is a folder without DICOM images of its own; expected the files of one "
            f"series. Give one of the folders in it that have some: {', '.join(with_dicom)}."
        )
    return DatasetError(
        f"{folder}: is a folder without DICOM images (it holds {len(_files(folder))} other files "
        f"and {len(inside)} folders); expected an image file, or a folder with the files of one "
        "DICOM series. Give that file or folder."
    )


def _words(series: Series) -> str:
    """Return one series as an error lists it; file names tell its files from others."""
    first, last = min(series.files), max(series.files)
    return (
        f"{series.description or '(no description)'}, {series.modality or 'no modality'}, "
        f"{series.num_slices} slices, UID ending in {series.uid[-12:] or '(none)'}, "
        f"files {first.name} to {last.name}"
    )


def _as_stored(pixels: Sequence[Pixels]) -> NDArray[Any]:
    """Return slices (J, I) as one array (I, J, K) whose memory runs along I first."""
    kind = np.result_type(*(one.rows.dtype for one in pixels))
    volume = np.empty((len(pixels), *pixels[0].rows.shape), dtype=kind)
    for number, one in enumerate(pixels):
        volume[number] = one.rows
    return volume.transpose(2, 1, 0)


def _scaled(pixels: Sequence[Pixels]) -> NDArray[np.float32]:
    """Return the same, each slice scaled in double precision as it asks for."""
    volume = np.empty((len(pixels), *pixels[0].rows.shape), dtype=np.float32)
    for number, one in enumerate(pixels):
        volume[number] = one.rows * np.float64(one.slope) + one.inter
    return volume.transpose(2, 1, 0)
