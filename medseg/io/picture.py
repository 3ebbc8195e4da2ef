"""Flat pictures: PNG, JPEG and BMP through Pillow. Damage that it passes over is found here."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from medseg.errors import DatasetError
from medseg.io.colour import OPAQUE, without_opacity
from medseg.io.image import Header, Stored, check_length, unreadable
from medseg.io.spacing import check_place, header_of

LARGEST_PICTURE = 2**28
"""Pixels; whoever declares more has made a bomb, or should cut the picture into tiles."""
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LARGEST = {".png": 65535, ".bmp": 255}
_GREY = ("1", "L", "P", "I;16", "I")
_CHANNELS_OF_COLOUR_TYPE = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_GREY_TYPE, _RGB_TYPE, _PALETTE_TYPE, _GREY_AND_OPACITY, _RGB_AND_OPACITY = 0, 2, 3, 4, 6
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
)  # fmt: skip
"""First column and row of each pass of an interlaced picture, and the steps between pixels."""
_PIECE = 2**20
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A marker of JPEG that is neither stuffing nor a restart."""


def read(path: Path) -> Stored:
    """Read a picture: columns become axis I, rows axis J, from the upper left corner.

    Values are those in the file; a picture with a palette gives its indices, beside the palette.
    What is in the file counts, whichever of the three formats the name promises.

    Args:
        path: A PNG, JPEG or BMP file.

    Raises:
        DatasetError: If the file is damaged, holds several pictures, is not opaque, is to be shown
            turned, or is too large.
    """
    content = path.read_bytes()
    if content.startswith(_PNG_SIGNATURE):
        return _read_png(path, content)
    if content.startswith(b"\xff\xd8"):
        _check_jpeg_ends(path, content)
        return _stored(path, _open(path, JpegImageFile, content), is_lossy=True)
    if content.startswith(b"BM"):
        check_length(path, len(content), max(len(content), int.from_bytes(content[2:6], "little")))
        return _stored(path, _open(path, BmpImageFile, content))
    raise unreadable(path, "it does not begin as a PNG, JPEG or BMP file does")


def _open(path: Path, plugin: Any, content: bytes) -> Any:
    """Read the header of a picture, and check its size before memory is taken."""
    try:
        image = plugin(BytesIO(content))
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise unreadable(path, f"its header is not valid ({error})") from None
    columns, rows = image.size
    if columns * rows > LARGEST_PICTURE:
        raise DatasetError(
            f"{path}: has {columns} x {rows} pixels; expected at most {LARGEST_PICTURE:,} in all. "
            "If the file is what it says, cut it into tiles."
        )
    return image


def _stored(path: Path, image: Any, *, is_lossy: bool = False) -> Stored:
    """Decode a picture."""
    check_upright(path, _orientation(image))
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise unreadable(path, f"its pixels cannot be read whole ({error})") from None
    if image.mode in ("RGB", "L") and "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    palette = _palette(image) if image.mode == "P" else None
    return from_rows(path, _rows(path, image), palette=palette, is_lossy=is_lossy)


def _rows(path: Path, image: Any) -> NDArray[Any]:
    """Return (rows, columns) or (rows, columns, 3)."""
    array = np.asarray(image)
    if image.mode in _GREY:
        return array.astype(np.uint8) if array.dtype == np.bool_ else array
    if image.mode == "RGB":
        return array
    if image.mode in ("LA", "RGBA"):
        return without_opacity(array, OPAQUE, str(path))
    raise DatasetError(
        f"{path}: holds {image.mode} values; expected grey, RGB or a palette. Save the picture in "
        "one of these."
    )


def from_rows(
    path: Path,
    rows: NDArray[Any],
    *,
    palette: NDArray[np.uint8] | None = None,
    is_lossy: bool = False,
) -> Stored:
    """Return what a flat picture holds, given its rows from the top: (rows, columns[, C])."""
    is_grey = rows.ndim == 2
    array = rows.T[:, :, np.newaxis] if is_grey else rows.transpose(1, 0, 2)[:, :, np.newaxis]
    return Stored(
        array=array,
        header=header_of(path, array.shape[:2], None),
        fourth="series" if is_grey else "colours",
        palette=palette,
        is_lossy=is_lossy,
    )


def _palette(image: Any) -> NDArray[np.uint8]:
    """Return (n, 4) red, green, blue and opacity."""
    colours = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    opacity = np.full((len(colours), 1), OPAQUE, dtype=np.uint8)
    clear = image.info.get("transparency", b"")
    if isinstance(clear, int):
        opacity[clear] = 0
    else:
        opacity[: len(clear), 0] = np.frombuffer(clear, dtype=np.uint8)[: len(opacity)]
    return np.concatenate([colours, opacity], axis=1)


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1


def check_upright(path: Path, orientation: int) -> None:
    """Check that a picture is shown as it is stored (0 is no orientation at all)."""
    if orientation not in (0, 1):
        raise DatasetError(
            f"{path}: is to be shown turned or mirrored (its orientation tag is {orientation}), "
            "which some programs do and others do not, so a segmentation may lie on either; "
            "expected no such tag. Turn the pixels, remove the tag (ImageMagick: -auto-orient), "
            "and look whether image and segmentation agree."
        )


def _read_png(path: Path, content: bytes) -> Stored:
    """Read a PNG file; Pillow cuts 16-bit colours to 8 bits, so they go other ways."""
    header, packed = _png_chunks(path, content)
    _check_png_pixels(path, header, packed)
    image = _open(path, PngImageFile, content)
    depth, colour_type = header[8:10]
    if depth < 16 or colour_type in (_GREY_TYPE, _PALETTE_TYPE):
        return _stored(path, image)
    check_upright(path, _orientation(image))
    if colour_type == _GREY_AND_OPACITY:
        rows = _deep_grey_and_opacity(path, content)
    else:
        from medseg.io import sitk

        rows = sitk.read_rows(path)
    if colour_type != _RGB_TYPE:
        rows = without_opacity(rows, np.iinfo(np.uint16).max, str(path))
    return from_rows(path, rows)


def _deep_grey_and_opacity(path: Path, content: bytes) -> NDArray[np.uint16]:
    """Return (rows, columns, 2): two values of 16 bits lie in a file as four of 8 bits do."""
    start, end = len(_PNG_SIGNATURE) + 4, len(_PNG_SIGNATURE) + 21
    header = content[start : end - 5] + bytes([8, _RGB_AND_OPACITY]) + content[end - 3 : end]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    image = _open(path, PngImageFile, content[:start] + header + checksum + content[end + 4 :])
    image.load()
    return np.asarray(image).view(">u2").astype(np.uint16)


def _png_chunks(path: Path, content: bytes) -> tuple[bytes, bytes]:
    """Check every chunk and its checksum, and that there is one picture.

    What follows the end of the picture is no part of it.

    Returns:
        Header and packed pixels.
    """
    position, header, packed = len(_PNG_SIGNATURE), b"", []
    while True:
        length, kind = struct.unpack(">I4s", content[position : position + 8].ljust(8, b"\0"))
        body = content[position + 8 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        if len(checksum) < 4:
            raise unreadable(path, "its chunks end early (cut short)")
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            raise unreadable(path, f"the checksum of its chunk {kind!r} is wrong")
        if kind == b"acTL":
            raise DatasetError(
                f"{path}: is an animation; expected one picture. Save its pictures one by one."
            )
        header = header or body
        if kind == b"IDAT":
            packed.append(body)
        elif kind == b"IEND":
            return header, b"".join(packed)
        position += 12 + length


def _check_png_pixels(path: Path, header: bytes, packed: bytes) -> None:
    """Check that the packed pixels are as many as the header says: Pillow leaves others black."""
    try:
        columns, rows, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        bits = depth * _CHANNELS_OF_COLOUR_TYPE[colour_type]
    except (struct.error, KeyError):
        raise unreadable(path, "its header is not valid") from None
    expected = 0
    for column, row, width, height in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        wide, high = -((column - columns) // width), -((row - rows) // height)
        expected += high * (1 + -(-wide * bits // 8)) if wide > 0 else 0
    found, decoder = 0, zlib.decompressobj()
    try:
        piece = decoder.decompress(packed, _PIECE)
        while piece and found <= expected:
            found += len(piece)
            piece = decoder.decompress(decoder.unconsumed_tail, _PIECE)
    except zlib.error as error:
        raise unreadable(path, f"the compressed data are broken ({error})") from None
    check_length(path, found, expected)


def _check_jpeg_ends(path: Path, content: bytes) -> None:
    """Check that the picture has its end marker; decoders fill what is missing with grey."""
    position = 2
    while True:
        found = _MARKER.search(content, position)
        if found is None:
            raise unreadable(path, "it has no end marker (cut short)")
        kind, position = content[found.start() + 1], found.end()
        if kind == 0xD9:
            return
        if kind != 0x01:
            position += int.from_bytes(content[position : position + 2], "big")


def write(path: Path, array: NDArray[Any], header: Header) -> None:
    """Write a label map as a picture; not atomic, `medseg.io.write` sees to that.

    Args:
        path: `.png` or `.bmp`.
        array: (I, J, 1) integers.
        header: Geometry.

    Raises:
        DatasetError: If the format cannot hold the values, or not without loss.
        GeometryError: If the format cannot hold the geometry.
    """
    ending = path.suffix.lower()
    if ending not in _LARGEST:
        raise DatasetError(
            f"{path.name}: JPEG changes the values it stores; expected a format without loss. "
            "Write .png instead."
        )
    check_place(path.name, header)
    if array.shape[2] != 1:
        raise DatasetError(
            f"{path.name}: a picture holds one slice, got an array of shape {array.shape}. "
            "Write .tif or .nii.gz instead."
        )
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > _LARGEST[ending]:
        raise DatasetError(
            f"{path.name}: got {array.dtype} values from {array.min()} to {array.max()}; this "
            f"format holds integers from 0 to {_LARGEST[ending]}. Write .tif or .nii.gz instead."
        )
    dtype = np.uint8 if array.max() <= 255 else np.uint16
    rows = np.ascontiguousarray(array[:, :, 0].T, dtype=dtype)
    Pillow.fromarray(rows).save(path, format=ending[1:])
