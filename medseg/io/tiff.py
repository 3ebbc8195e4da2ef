"""TIFF, flat or a stack of pages, through tifffile; LZW is unpacked by Pillow."""

from __future__ import annotations

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.TiffImagePlugin import TiffImageFile

from medseg.errors import DatasetError
from medseg.io.colour import without_opacity
from medseg.io.image import Header, Stored, check_length, unreadable
from medseg.io.picture import check_upright
from medseg.io.spacing import Spacing, check_place, header_of, thickness

tiff: Any = tifffile
"""The library, used without its types."""
_LZW = 5
_COMPRESSIONS = (1, _LZW, 8, 32946, 32773)
"""None, LZW, deflate twice, PackBits."""
_BITS = (1, 8, 16, 32, 64)
_LARGEST_RATIO = 3000
_BYTES_PER_VALUE = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
"""Type of a field -> size of its values."""
_RGB = 2
_MEANINGS = (0, 1, _RGB, 3)
"""White is zero, black is zero, RGB, palette."""
_OPACITIES = (1, 2)
_ORIENTATION = 274
_MM_PER_UNIT = {
    "m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "\u03bcm": 1e-3, "\\u00b5m": 1e-3,
    "micron": 1e-3, "microns": 1e-3, "micrometer": 1e-3, "nm": 1e-6, "inch": 25.4, "in": 25.4,
    "millimeter": 1.0, "centimeter": 10.0,
}  # fmt: skip
_DEPTH = "ZQI"
"""Axes that are depth rather than channel, where there are two to choose from."""


def read(path: Path) -> Stored:
    """Read a flat TIFF picture, or a stack whose pages become axis K.

    Columns become axis I, rows axis J, from the upper left corner. Values are those in the file,
    also where it has a palette or means white by zero. Channels that ImageJ or OME metadata name
    lie along the fourth axis. The voxel size comes from the file beside it (see
    `medseg.io.spacing`), else from ImageJ or OME metadata with a unit of length; a resolution in
    dots per inch is about paper and does not count.

    Raises:
        DatasetError: If the file is damaged, is not opaque, is to be shown turned, holds pictures
            of several kinds, or is packed in a way that is not read.
    """
    _check_pages(path)
    try:
        with tiff.TiffFile(path) as file:
            series = _only_series(path, file)
            _check_kind(path, series.keyframe)
            array = _pixels(path, file, series).reshape(series.shape)
            array, is_stack = _arranged(path, series.axes, array)
            array = _without_opacity(path, series.keyframe, array)
            shape = array.shape[: 3 if is_stack else 2]
            header = header_of(path, shape, _spacing(file, is_stack))
            is_rgb = series.keyframe.photometric == _RGB
            return Stored(array=array, header=header, fourth="colours" if is_rgb else "values")
    except (DatasetError, OSError):
        raise
    except Exception as error:  # the parser raises whatever a damaged file makes it stumble over
        raise unreadable(path, f"it is no valid TIFF file ({error})") from None


def _check_pages(path: Path) -> None:
    """Follow the chain of pages: what is cut off would otherwise be a shorter stack."""
    with open(path, "rb") as file:
        start = _read_at(file, 0, 8)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        version = struct.unpack(f"{order}H", start[2:4])[0] if order else 0
        if version == 42:
            layout = struct.Struct(f"{order}H"), struct.Struct(f"{order}HHI4s"), f"{order}I"
            (position,) = struct.unpack(f"{order}I", start[4:])
        elif version == 43:
            layout = struct.Struct(f"{order}Q"), struct.Struct(f"{order}HHQ8s"), f"{order}Q"
            (position,) = struct.unpack(f"{order}Q", _read_at(file, 8, 8))
        else:
            raise unreadable(path, "it does not begin as a TIFF file does")
        seen: set[int] = set()
        while position:
            if position in seen:
                raise unreadable(path, "its pages lead round in a circle")
            seen.add(position)
            position = _check_page(file, position, *layout)


def _check_page(
    file: Any, position: int, counter: struct.Struct, entry: struct.Struct, offset_code: str
) -> int:
    """Check that every field of a page lies in the file; return where the next page is."""
    (count,) = counter.unpack(_read_at(file, position, counter.size))
    position += counter.size
    for _, kind, number, value in entry.iter_unpack(_read_at(file, position, count * entry.size)):
        length = _BYTES_PER_VALUE.get(kind, 0) * number
        if length > len(value):
            (offset,) = struct.unpack(offset_code, value)
            _read_at(file, offset + length - 1, 1)
    position += count * entry.size
    after: int = struct.unpack(offset_code, _read_at(file, position, struct.calcsize(offset_code)))[
        0
    ]
    return after


def _read_at(file: Any, position: int, length: int) -> bytes:
    if length > os.fstat(file.fileno()).st_size - position:
        raise unreadable(Path(file.name), "a part of it is missing (cut short)")
    file.seek(position)
    found: bytes = file.read(length)
    return found


def _only_series(path: Path, file: Any) -> Any:
    """Return the one picture or stack in a file."""
    found = file.series
    if not found:
        raise unreadable(path, "it holds no picture")
    if len(found) != 1:
        shapes = ", ".join(str(series.shape) for series in found[:4])
        raise DatasetError(
            f"{path}: holds {len(found)} images of different sizes or kinds, shapes {shapes}; "
            "expected one picture, or a stack of pages that are alike. Save one image per file."
        )
    return found[0]


def _check_kind(path: Path, page: Any) -> None:
    tag = page.tags.get(_ORIENTATION)
    check_upright(path, 1 if tag is None else int(tag.value))
    problems = []
    if page.photometric not in _MEANINGS:
        problems.append(f"its colours are {page.photometric!r}; expected grey or RGB")
    if page.compression not in _COMPRESSIONS or page.predictor not in (1, 2):
        problems.append(
            f"it is packed with {page.compression!r}, predictor {int(page.predictor)}; expected no "
            "compression, LZW, deflate or PackBits, without predictor or with the horizontal one"
        )
    if page.dtype is None or page.bitspersample not in _BITS:
        problems.append(f"it has {page.bitspersample} bits per value; expected 1, 8, 16, 32 or 64")
    elif page.dtype.kind not in "buif":
        problems.append(f"it holds {page.dtype} values; expected real numbers")
    if problems:
        raise DatasetError(f"{path}: {'; '.join(problems)}. Save it again without compression.")


def _pixels(path: Path, file: Any, series: Any) -> NDArray[Any]:
    """Return the values of all pages, flat or page by page; every byte must be there."""
    page, size = series.keyframe, path.stat().st_size
    num_values = int(np.prod(series.shape, dtype=object))
    if series.dataoffset is not None:
        dtype = page.dtype.newbyteorder(file.byteorder)
        needed = num_values * dtype.itemsize
        check_length(path, min(max(size - series.dataoffset, 0), needed), needed)
        return np.fromfile(path, dtype=dtype, count=num_values, offset=series.dataoffset)
    if num_values * page.bitspersample // 8 > size * _LARGEST_RATIO:
        raise unreadable(path, f"its {size} bytes cannot hold {num_values} values")
    dtype = np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype
    pages = [None] if series.pages is None else list(series.pages)
    out = np.empty((len(pages), *page.shaped), dtype=dtype)
    unpack_lzw = page.compression == _LZW
    if unpack_lzw:
        page.compression = 1
    with open(path, "rb") as data:
        for values, part in zip(out, pages, strict=True):
            if part is None or part.parent is not file:
                raise unreadable(path, "a page is missing, or lies in another file")
            _fill_page(values, part, data, unpack_lzw)
    return out


def _fill_page(out: NDArray[Any], page: Any, data: Any, unpack_lzw: bool) -> None:
    """Decode the strips or tiles of one page into an array (planes, depth, rows, columns, C)."""
    for number, (offset, length) in enumerate(
        zip(page.dataoffsets, page.databytecounts, strict=True)
    ):
        if not length:
            raise unreadable(Path(data.name), "a part of a page is empty")
        packed = _read_at(data, offset, length)
        if unpack_lzw:
            _, _, shape = page.decode(None, number)
            bits = shape[2] * shape[3] * page.keyframe.bitspersample
            packed = _unpacked_lzw(packed, shape[0] * shape[1] * -(-bits // 8), Path(data.name))
        values, (plane, depth, row, column, _), _ = page.decode(packed, number)
        target = out[plane, depth:, row:, column:]
        target = target[: values.shape[0], : values.shape[1], : values.shape[2]]
        target[...] = values[: target.shape[0], : target.shape[1], : target.shape[2]]


def _unpacked_lzw(packed: bytes, length: int, path: Path) -> bytes:
    """Unpack LZW data: Pillow reads them as the one row of a picture made up around them."""
    entries = [
        (256, 4, length), (257, 4, 1), (258, 3, 8), (259, 3, _LZW), (262, 3, 1),
        (273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(packed)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    padding = bytes(len(packed) % 2)
    start = struct.pack("<4sI", b"II*\0", 8 + len(packed) + len(padding))
    ending = struct.pack("<H", len(entries)) + directory + bytes(4)
    try:
        image = TiffImageFile(BytesIO(start + packed + padding + ending))
        return np.asarray(image).tobytes()
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, f"the compressed data are broken ({error})") from None


def _arranged(path: Path, axes: str, array: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Return (I, J, K) or (I, J, K, N), and whether there is an axis of pages."""
    letters = [
        letter for letter, length in zip(axes, array.shape, strict=True)
        if length > 1 or letter in "YX"
    ]  # fmt: skip
    array = array.reshape([n for a, n in zip(axes, array.shape, strict=True) if n > 1 or a in "YX"])
    others = [letter for letter in letters if letter not in "YX"]
    depth = _depth(others)
    channels = [letter for letter in others if letter != depth]
    if len(channels) > 1:
        raise DatasetError(
            f"{path}: has the axes {axes}, shape {array.shape}; expected columns, rows, pages and "
            "channels. Save one volume per file."
        )
    order = ["X", "Y", *([depth] if depth else []), *channels]
    array = array.transpose([letters.index(letter) for letter in order])
    return array if depth else array[:, :, np.newaxis], depth is not None


def _depth(others: list[str]) -> str | None:
    """Return which axis is that of the slices: a single one always is, unless it has channels."""
    candidates = [letter for letter in others if letter not in "SC"]
    known = [letter for letter in candidates if letter in _DEPTH]
    return next(iter([*known, *candidates]), None)


def _without_opacity(path: Path, page: Any, array: NDArray[Any]) -> NDArray[Any]:
    extra = page.extrasamples
    if len(extra) != 1 or extra[0] not in _OPACITIES or array.ndim != 4:
        return array
    opaque = 1.0 if array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
    return without_opacity(array, opaque, str(path))


def _spacing(file: Any, is_stack: bool) -> Spacing | None:
    """Return the voxel size (I, J, K) in mm that metadata tell together with its unit."""
    found = _imagej_spacing(file) if file.is_imagej else _ome_spacing(file)
    columns, rows, pages = found
    if not (columns and rows and columns > 0 and rows > 0):
        return None
    if not is_stack:
        return columns, rows, thickness(columns, rows)
    return (columns, rows, pages) if pages and pages > 0 else None


def _imagej_spacing(file: Any) -> tuple[float | None, float | None, float | None]:
    metadata, tags = file.imagej_metadata or {}, file.pages.first.tags
    scale = _MM_PER_UNIT.get(str(metadata.get("unit", "")).lower())
    if scale is None or "XResolution" not in tags or "YResolution" not in tags:
        return None, None, None
    (x, per_x), (y, per_y) = tags["XResolution"].value, tags["YResolution"].value
    pages = abs(float(metadata.get("spacing", 1.0))) * scale
    return scale * per_x / x if x else None, scale * per_y / y if y else None, pages


def _ome_spacing(file: Any) -> tuple[float | None, float | None, float | None]:
    if not file.is_ome:
        return None, None, None
    pixels = ElementTree.fromstring(file.ome_metadata).find(".//{*}Pixels")
    values = {} if pixels is None else pixels.attrib

    def size(axis: str) -> float | None:
        scale = _MM_PER_UNIT.get(values.get(f"PhysicalSize{axis}Unit", "um").lower())
        length = values.get(f"PhysicalSize{axis}")
        return float(length) * scale if length and scale else None

    return size("X"), size("Y"), size("Z")


def write(path: Path, array: NDArray[Any], header: Header) -> None:
    """Write a picture or a stack, deflated; not atomic, `medseg.io.write` sees to that.

    Args:
        path: `.tif` or `.tiff`.
        array: (I, J, K), written in its own type; K becomes pages.
        header: Geometry; `medseg.io.spacing` writes the voxel size beside it.

    Raises:
        GeometryError: If the format cannot hold the geometry.
    """
    check_place(path.name, header)
    pages = np.ascontiguousarray(array.T, dtype=array.dtype.newbyteorder("="))
    tiff.imwrite(
        path,
        pages[0] if len(pages) == 1 else pages,
        photometric="minisblack",
        compression="zlib",
        metadata=None,
        software=False,
    )
