"""The header of one DICOM file, walked byte by byte: what it says, and whether it is whole.

Source:
    DICOM PS3.5 (data structures and encoding, 2024) sections 6.2, 7.1, 7.5 and A.4, and PS3.10
    section 7.1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medseg.errors import DatasetError
from medseg.io.image import unreadable

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
NATIVE = (IMPLICIT, EXPLICIT)
"""Transfer syntaxes whose pixels are plain little-endian numbers."""
COMPRESSED = {
    "1.2.840.10008.1.2.4.50": "JPEG",
    "1.2.840.10008.1.2.4.51": "JPEG, 12 bits",
    "1.2.840.10008.1.2.4.57": "lossless JPEG",
    "1.2.840.10008.1.2.4.70": "lossless JPEG",
    "1.2.840.10008.1.2.4.80": "lossless JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "lossless JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.5": "RLE",
}
"""Transfer syntaxes whose pixels are packed and can be unpacked."""
NO_IMAGES = (
    "1.2.840.10008.1.3.10",  # DICOMDIR
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations
    "1.2.840.10008.5.1.4.1.1.88.",  # reports
    "1.2.840.10008.5.1.4.1.1.104.",  # documents
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy
)
"""How the UIDs of storage classes begin that are no images of a patient."""

_PREAMBLE, _MAGIC = 128, b"DICM"
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""Value representations followed by two empty bytes and a length of four."""
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = 0x7FE00010
_LONGEST_VALUE = 4096
"""Bytes of a value that is kept; longer ones are passed over."""
_DEEPEST = 32
"""Sequences within sequences; no real file comes near."""
_ENCODINGS = {
    "": "latin-1", "ISO_IR 100": "latin-1", "ISO_IR 192": "utf-8", "GB18030": "gb18030",
    "GBK": "gbk", "ISO_IR 101": "iso8859-2", "ISO_IR 144": "iso8859-5", "ISO_IR 126": "iso8859-7",
    "ISO_IR 13": "shift_jis",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomHeader:
    """What stands in a DICOM file outside its sequences and before its pixels."""

    path: Path
    syntax: str
    """UID of the transfer syntax: how the file is encoded."""
    values: Mapping[int, bytes]
    """Tag (group x 65536 + element) -> value; of a sequence or a long value an empty one."""
    pixels_at: int | None
    """Where the pixel data begin in the file, bytes; None where there are none."""
    pixels_bytes: int
    """Length of native pixel data."""
    is_packed: bool
    """Whether the pixel data are in fragments, as compressed ones are."""

    def text(self, tag: int) -> str:
        """Return a value as text without padding, empty where it is missing."""
        name = self.values.get(0x00080005, b"").decode("ascii", "replace").strip("\0 ")
        return (
            self.values.get(tag, b"").decode(_ENCODINGS.get(name, "ascii"), "replace").strip("\0 ")
        )

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Return the numbers of a text such as `0.5\\0.5`, none where it is missing.

        Raises:
            DatasetError: If it is no list of finite numbers.
        """
        text = self.text(tag)
        try:
            values = tuple(float(part) for part in text.split("\\")) if text else ()
        except ValueError:
            values = (math.nan,)
        if all(math.isfinite(value) for value in values):
            return values
        raise DatasetError(
            f"{self.path}: {tag_words(tag)} is '{text}'; expected numbers. Correct it, or export "
            "the series again."
        )

    def whole(self, tag: int, default: int | None = None) -> int:
        """Return an unsigned number of 16 bits.

        Raises:
            DatasetError: If it is missing and there is no default.
        """
        value = self.values.get(tag, b"")
        if len(value) >= 2:
            return int.from_bytes(value[:2], "little")
        if default is None:
            raise DatasetError(
                f"{self.path}: {tag_words(tag)} is missing; expected a number. "
                "Export the series again."
            )
        return default

    @property
    def num_frames(self) -> int:
        """Slices in this file.

        Raises:
            DatasetError: If NumberOfFrames is no number.
        """
        frames, *_ = (*self.numbers(0x00280008), 1.0)
        return max(int(frames), 1)


def tag_words(tag: int) -> str:
    """Return a tag as messages show it.

    Examples:
        >>> tag_words(0x00280030), tag_words(0x00180081)
        ('PixelSpacing (0028,0030)', '(0018,0081)')
    """
    names = {
        0x00180050: "SliceThickness ",
        0x00200032: "ImagePositionPatient ",
        0x00200037: "ImageOrientationPatient ",
        0x00280008: "NumberOfFrames ",
        0x00280010: "Rows ",
        0x00280011: "Columns ",
        0x00280030: "PixelSpacing ",
        0x00280100: "BitsAllocated ",
        0x00281052: "RescaleIntercept ",
        0x00281053: "RescaleSlope ",
    }
    return f"{names.get(tag, '')}({tag >> 16:04X},{tag & 0xFFFF:04X})"


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM files do, whatever its name."""
    with path.open("rb") as file:
        file.seek(_PREAMBLE)
        return file.read(len(_MAGIC)) == _MAGIC


def read_header(path: Path) -> DicomHeader | None:
    """Read the header of a DICOM file, and walk through its pixel data.

    Returns:
        None for a file that holds no image of a patient, such as DICOMDIR or a report.

    Raises:
        DatasetError: If the file is cut short, holds what is no DICOM, or is encoded in a way that
            cannot be read.
    """
    with path.open("rb") as file:
        file.seek(_PREAMBLE + len(_MAGIC))
        walk = _Walk(path=path, file=file, size=path.stat().st_size)
        meta = walk.meta()
        storage_class, syntax = _text(meta, 0x00020002), _text(meta, 0x00020010)
        if storage_class.startswith(NO_IMAGES):
            return None
        if syntax not in NATIVE and syntax not in COMPRESSED:
            raise DatasetError(
                f"{path}: is encoded with the transfer syntax {syntax or '(none given)'}; expected "
                f"one of {', '.join((*NATIVE, *COMPRESSED))}. Convert the series to explicit "
                "little endian, for instance with gdcmconv --raw."
            )
        walk.is_explicit = syntax != IMPLICIT
        values = walk.body()
    return DicomHeader(
        path=path,
        syntax=syntax,
        values=values,
        pixels_at=walk.pixels_at,
        pixels_bytes=walk.pixels_bytes,
        is_packed=walk.is_packed,
    )


def _text(values: Mapping[int, bytes], tag: int) -> str:
    return values.get(tag, b"").decode("ascii", "replace").strip("\0 ")


@dataclass(slots=True, kw_only=True)
class _Walk:
    """A way through the elements of one file."""

    path: Path
    file: BinaryIO
    size: int
    is_explicit: bool = True
    pixels_at: int | None = None
    pixels_bytes: int = 0
    is_packed: bool = False

    def meta(self) -> dict[int, bytes]:
        """Return the elements of group 2, which are explicit little endian in every file."""
        values: dict[int, bytes] = {}
        while True:
            start = self.file.tell()
            group = self.file.read(2)
            self.file.seek(start)
            if group != b"\2\0":
                return values
            tag, kind, length = self._element(is_explicit=True)
            values[tag] = self._value(tag, kind, length, is_explicit=True)

    def body(self) -> dict[int, bytes]:
        """Return the elements between group 2 and the pixel data; what follows those is left."""
        values: dict[int, bytes] = {}
        while self.file.tell() < self.size:
            tag, kind, length = self._element(is_explicit=self.is_explicit)
            if tag == _PIXELS:
                self._pixels(length)
                break
            values[tag] = self._value(tag, kind, length, is_explicit=self.is_explicit)
        return values

    def _element(self, *, is_explicit: bool) -> tuple[int, bytes, int]:
        """Return tag, value representation and length of the next element."""
        group, number = struct.unpack("<HH", self._bytes(4))
        tag = group << 16 | number
        if group == 0xFFFE or not is_explicit:
            return tag, b"", struct.unpack("<I", self._bytes(4))[0]
        kind = self._bytes(2)
        if not kind.isalpha() or not kind.isupper():
            raise unreadable(
                self.path,
                f"holds {kind!r} as the value representation of {tag_words(tag)}, byte "
                f"{self.file.tell() - 2}",
                "two capital letters",
            )
        if kind in _LONG:
            return tag, kind, struct.unpack("<2xI", self._bytes(6))[0]
        return tag, kind, struct.unpack("<H", self._bytes(2))[0]

    def _value(self, tag: int, kind: bytes, length: int, *, is_explicit: bool) -> bytes:
        """Return a value if it is short, and stand behind it."""
        if length == _UNDEFINED:
            self._items(is_explicit=is_explicit and kind != b"UN", depth=1)
            return b""
        if kind == b"SQ" or length > _LONGEST_VALUE:
            self._skip(length, tag)
            return b""
        return self._bytes(length)

    def _items(self, *, is_explicit: bool, depth: int) -> None:
        """Pass over a sequence of undefined length."""
        if depth > _DEEPEST:
            raise unreadable(self.path, f"holds sequences nested {depth} deep")
        while True:
            tag, length = self._item()
            if tag == _SEQUENCE_END:
                return
            if length != _UNDEFINED:
                self._skip(length, tag)
                continue
            while True:
                tag, kind, length = self._element(is_explicit=is_explicit)
                if tag == _ITEM_END:
                    break
                if length == _UNDEFINED:
                    self._items(is_explicit=is_explicit and kind != b"UN", depth=depth + 1)
                else:
                    self._skip(length, tag)

    def _pixels(self, length: int) -> None:
        """Note where the pixel data lie, and pass over them."""
        self.pixels_at, self.is_packed = self.file.tell(), length == _UNDEFINED
        if length != _UNDEFINED:
            self.pixels_bytes = length
            self._skip(length, _PIXELS)
            return
        while True:
            tag, length = self._item()
            if tag == _SEQUENCE_END:
                return
            self._skip(length, tag)

    def _item(self) -> tuple[int, int]:
        """Return tag and length where an item begins or a sequence ends."""
        tag, _, length = self._element(is_explicit=False)
        if tag not in (_ITEM, _SEQUENCE_END):
            raise unreadable(
                self.path,
                f"holds {tag_words(tag)} within a sequence, byte {self.file.tell() - 8}",
                "an item",
            )
        return tag, length

    def _bytes(self, count: int) -> bytes:
        content = self.file.read(count)
        if len(content) < count:
            raise unreadable(self.path, f"ends after {self.size} bytes within an element")
        return content

    def _skip(self, count: int, tag: int) -> None:
        missing = self.file.tell() + count - self.size
        if missing > 0:
            what = "the pixel data" if tag == _PIXELS else tag_words(tag)
            raise unreadable(
                self.path, f"{missing} of {count} bytes of {what} are missing (cut short)"
            )
        self.file.seek(count, 1)
