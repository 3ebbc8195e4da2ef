"""The pixels of one DICOM slice. Plain ones are read here, compressed ones through ITK.

ITK is not asked for plain ones: it takes pixel data that are too short without a word, turns
MONOCHROME1 upside down and passes over a slope that is no number.

Source:
    DICOM PS3.5 (2024) section 8 (pixel data), PS3.3 section C.11.1 (rescaling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.io.dicom_header import COMPRESSED, NATIVE, DicomHeader, tag_words
from medseg.io.image import unreadable

_SAMPLES, _PHOTOMETRIC = 0x00280002, 0x00280004
_ROWS, _COLUMNS = 0x00280010, 0x00280011
_ALLOCATED, _STORED, _HIGH, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_INTERCEPT, _SLOPE, _LOOKUP = 0x00281052, 0x00281053, 0x00283000


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pixels:
    """The values of one slice."""

    rows: NDArray[Any]
    """(J, I): rows from the first, columns from the first."""
    slope: float
    inter: float


def read_pixels(header: DicomHeader) -> Pixels:
    """Read one slice.

    Raises:
        DatasetError: If the values are colours, too few, damaged, or packed in a way that cannot be
            unpacked.
    """
    _check_kind(header)
    slope, inter = _scaling(header)
    if header.syntax in NATIVE:
        return Pixels(rows=_native(header), slope=slope, inter=inter)
    return Pixels(rows=_unpacked(header), slope=1.0, inter=0.0)  # ITK has scaled them


def _check_kind(header: DicomHeader) -> None:
    """Check that a slice holds one grey value per pixel."""
    if header.pixels_at is None:
        raise unreadable(header.path, "holds no pixel data")
    photometric = header.text(_PHOTOMETRIC)
    if header.whole(_SAMPLES, 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DatasetError(
            f"{header.path}: is in colour ({photometric or 'kind not given'}, "
            f"{header.whole(_SAMPLES, 1)} samples per pixel); expected grey values (MONOCHROME2). "
            "Give the original series, not a screenshot or an overlay."
        )
    if header.is_packed != (header.syntax in COMPRESSED):
        raise unreadable(
            header.path,
            f"its pixel data are {'' if header.is_packed else 'not '}in fragments, but its "
            f"transfer syntax is {header.syntax}",
        )


def _scaling(header: DicomHeader) -> tuple[float, float]:
    """Return slope and intercept that lead from stored values to those meant."""
    if _LOOKUP in header.values:
        raise DatasetError(
            f"{header.path}: its values are scaled by a table (ModalityLUTSequence); expected "
            "slope and intercept. Convert it to NIfTI with a program that applies the table."
        )
    slope, inter = (
        (*header.numbers(tag), default)[0] for tag, default in ((_SLOPE, 1.0), (_INTERCEPT, 0.0))
    )
    if slope == 0:
        raise DatasetError(
            f"{header.path}: {tag_words(_SLOPE)} is 0, so that all values are the same; expected "
            "another number. Export the series again."
        )
    return slope, inter


def _native(header: DicomHeader) -> NDArray[Any]:
    """Return uncompressed pixels in the smallest type that holds their bits."""
    bits, stored = header.whole(_ALLOCATED), header.whole(_STORED, header.whole(_ALLOCATED))
    if bits not in (8, 16, 32) or not 1 <= stored <= bits:
        raise DatasetError(
            f"{header.path}: stores {stored} of {bits} bits per pixel; expected 8, 16 or 32 bits. "
            "Convert it to NIfTI, for instance with dcm2niix."
        )
    shape = header.whole(_ROWS), header.whole(_COLUMNS)
    expected = shape[0] * shape[1] * bits // 8
    if not expected <= header.pixels_bytes <= expected + 1:  # values have an even length
        raise unreadable(
            header.path,
            f"holds {header.pixels_bytes} bytes of pixel data",
            f"{expected} for {shape[0]} rows, {shape[1]} columns and {bits} bits",
        )
    with header.path.open("rb") as file:
        file.seek(header.pixels_at or 0)
        content = file.read(expected)
    values = np.frombuffer(content, dtype=f"<u{bits // 8}").reshape(shape)
    return _without_other_bits(header, values, bits, stored)


def _without_other_bits(
    header: DicomHeader, values: NDArray[Any], bits: int, stored: int
) -> NDArray[Any]:
    """Return the stored bits of each pixel alone, with their sign; others may hold overlays."""
    high = header.whole(_HIGH, stored - 1)
    if not stored - 1 <= high < bits:
        raise DatasetError(
            f"{header.path}: stores {stored} bits up to bit {high} of {bits}; expected these bits "
            "inside the pixel. Export the series again."
        )
    if high < bits - 1:
        values = values << (bits - 1 - high)  # the highest stored bit becomes the sign
    if header.whole(_SIGNED, 0):
        values = values.view(f"<i{bits // 8}")
    return values >> (bits - stored) if stored < bits else values


def _unpacked(header: DicomHeader) -> NDArray[Any]:
    """Return compressed pixels, scaled."""
    if header.text(_PHOTOMETRIC) == "MONOCHROME1":
        raise DatasetError(
            f"{header.path}: is compressed and shows large values dark (MONOCHROME1); expected "
            "MONOCHROME2. Unpack the series first, for instance with gdcmconv --raw."
        )
    from medseg.io import sitk

    kind = COMPRESSED[header.syntax]
    try:
        slices = sitk.read_rows(header.path)
    except DatasetError:
        raise unreadable(
            header.path, f"its pixel data ({kind}, {header.syntax}) cannot be unpacked"
        ) from None
    shape = header.whole(_ROWS), header.whole(_COLUMNS)
    if slices.shape != (1, *shape):
        raise unreadable(header.path, f"unpacks to shape {slices.shape}", f"{(1, *shape)}")
    rows: NDArray[Any] = slices[0]
    return rows
