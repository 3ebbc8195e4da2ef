"""Whether a file that ITK reads holds every voxel its header promises: ITK does not always tell.

Depending on format and version, ITK fills what is missing with arbitrary values, and passes over
surplus data and checksums. The headers of NRRD, MetaImage and GIPL are read here just far enough to
count the bytes of voxel data.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from medseg.errors import DatasetError
from medseg.io.image import check_length, unreadable

_BLOCK = 2**20
_GIPL_HEADER = 256
_GIPL_BYTES = {1: 1, 7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
_META_BYTES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
    "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
_NRRD_BYTES = {
    1: ("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"),
    2: ("short", "short int", "signed short", "signed short int", "int16", "int16_t",
        "ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    4: ("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t",
        "float"),
    8: ("longlong", "long long", "long long int", "signed long long", "signed long long int",
        "int64", "int64_t", "ulonglong", "unsigned long long", "unsigned long long int",
        "uint64", "uint64_t", "double"),
}  # fmt: skip
_LONGEST_HEADER = 2**20


def check_payload(path: Path, ending: str) -> None:
    """Check that a file holds exactly the voxel data its header promises.

    Args:
        path: A file, or the header file of a pair.
        ending: One of `.nrrd`, `.nhdr`, `.mha`, `.mhd`, `.gipl`; others are not checked.

    Raises:
        DatasetError: If data are missing, broken or too many, or if the header cannot be read.
    """
    check = {
        ".nrrd": _check_nrrd,
        ".nhdr": _check_nrrd,
        ".mha": _check_meta,
        ".mhd": _check_meta,
        ".gipl": _check_gipl,
    }.get(ending)
    if check is None:
        return
    try:
        check(path)
    except DatasetError:
        raise
    except (KeyError, ValueError, struct.error) as error:
        raise unreadable(path, f"its header cannot be read ({error})") from None


def _check_gipl(path: Path) -> None:
    with open(path, "rb") as file:
        *lengths, kind = struct.unpack(">5H", file.read(10))
    voxels = math.prod(max(length, 1) for length in lengths)
    check_length(path, path.stat().st_size, _GIPL_HEADER + voxels * _GIPL_BYTES[kind])


def _check_meta(path: Path) -> None:
    with open(path, "rb") as file:
        fields = _meta_fields(path, file)
        lengths = [int(part) for part in fields["DimSize"].split()]
        channels = int(fields.get("ElementNumberOfChannels", "1"))
        element = _META_BYTES[fields["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")]
        expected = math.prod(lengths) * channels * element
        data = fields["ElementDataFile"]
        compressed = fields.get("CompressedData", "False").lower() == "true"
        if data.upper() == "LOCAL":
            _check_data(path, file, expected, compressed)
            return
    header_bytes = int(fields.get("HeaderSize", "0"))
    with _open_data(path, data) as file:
        if header_bytes < 0:
            header_bytes = max(Path(file.name).stat().st_size - expected, 0)
        file.seek(header_bytes)
        _check_data(Path(file.name), file, expected, compressed)


def _meta_fields(path: Path, file: IO[bytes]) -> Mapping[str, str]:
    """Read `name = value` lines up to the one that says where the data are."""
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        line = file.readline(_LONGEST_HEADER)
        name, sign, value = line.decode("latin-1").partition("=")
        if not sign:
            raise unreadable(path, "its MetaImage header ends early", "a line ElementDataFile")
        fields[name.strip()] = value.strip()
    name = fields["ElementDataFile"].encode("latin-1").decode("utf-8", "surrogateescape")
    return {**fields, "ElementDataFile": name}


def _check_nrrd(path: Path) -> None:
    with open(path, "rb") as file:
        fields = _nrrd_fields(path, file)
        sizes = [int(part) for part in fields["sizes"].split()]
        kinds = [size for size, names in _NRRD_BYTES.items() if fields["type"].lower() in names]
        if not kinds:
            raise DatasetError(
                f"{path}: its NRRD type is {fields['type']!r}; expected a real number type such "
                "as short or float. Convert the image."
            )
        expected = math.prod(sizes) * kinds[0]
        data = fields.get("data file", fields.get("datafile"))
        if data is None:
            _check_nrrd_data(path, file, fields, expected)
            return
    with _open_data(path, data) as file:
        _check_nrrd_data(Path(file.name), file, fields, expected)


def _nrrd_fields(path: Path, file: IO[bytes]) -> Mapping[str, str]:
    """Read `name: value` lines up to the empty one."""
    if not file.readline(_LONGEST_HEADER).startswith(b"NRRD"):
        raise unreadable(path, "it does not begin with NRRD")
    fields: dict[str, str] = {}
    while line := file.readline(_LONGEST_HEADER):
        text = line.decode("utf-8", "surrogateescape").strip()
        if not text:
            break
        name, sign, value = text.partition(": ")
        if sign and not text.startswith("#"):
            fields[name.lower()] = value.strip()
    missing = {"type", "sizes", "encoding"} - set(fields)
    if missing:
        raise unreadable(path, f"its NRRD header has no {', '.join(sorted(missing))}")
    return fields


def _check_nrrd_data(path: Path, file: IO[bytes], fields: Mapping[str, str], expected: int) -> None:
    encoding = fields["encoding"].lower()
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    lines = int(fields.get("line skip", fields.get("lineskip", "0")))
    if encoding not in ("raw", "gz", "gzip") or (skip and encoding != "raw"):
        raise DatasetError(
            f"{path}: its NRRD encoding is {encoding!r} (byte skip {skip}); expected raw or gzip. "
            "Save it again with gzip encoding."
        )
    for _ in range(lines):
        file.readline(_LONGEST_HEADER)
    if skip < 0:
        skip = max(path.stat().st_size - expected - file.tell(), 0)
    file.seek(skip, 1)
    _check_data(path, file, expected, encoding != "raw")


def _open_data(path: Path, name: str) -> IO[bytes]:
    """Open the data file that a header names."""
    if name.split()[:1] == ["LIST"] or "%" in name:
        raise DatasetError(
            f"{path}: its voxels are spread over several files ({name}); expected one file. "
            "Save it as one file, for instance .nii.gz."
        )
    data = path.parent / name
    if not data.is_file():
        raise DatasetError(
            f"{path}: its data file {name} is missing; expected it at {data}. Copy both files."
        )
    return open(data, "rb")


def _check_data(path: Path, file: IO[bytes], expected: int, compressed: bool) -> None:
    """Check what is left of a file from where it stands."""
    if compressed:
        found = _inflated_length(path, file, expected)
    else:
        found = max(path.stat().st_size - file.tell(), 0)
    check_length(path, found, expected)


def _inflated_length(path: Path, file: IO[bytes], expected: int) -> int:
    """Return how many bytes gzip or zlib data hold, having checked their checksum."""
    decoder = zlib.decompressobj(wbits=47)
    length, block = 0, file.read(_BLOCK)
    try:
        while block and not decoder.eof and length <= expected:
            length += len(decoder.decompress(block, _BLOCK))
            block = decoder.unconsumed_tail or file.read(_BLOCK)
    except zlib.error as error:
        raise unreadable(path, f"the compressed data are broken ({error})") from None
    if not decoder.eof and length <= expected:
        raise unreadable(path, "the compressed data end too early (cut short)")
    rest = decoder.unused_data + block
    return length + len(rest)
