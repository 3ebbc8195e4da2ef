"""What an uploaded image says about itself, looked at before a reader follows it.

A reader believes a header: it opens the data file the header names, and sets aside the memory for
the size it tells. On a server neither may be chosen by whoever uploads.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from pathlib import Path

from medseg.execute.sizes import size_words
from medseg.io.gunzip import GunzipFile
from medseg.serve.limits import Limits, Refusal

_LONGEST_HEADER = 2**20
_NIFTI_HEADER = 540
_BYTES_PER_VOXEL = 4
_META_DATA = b"ElementDataFile"
_META_LOCAL = re.compile(rb"ElementDataFile[ \t]*=[ \t]*LOCAL[ \t]*\r?\n")
_META_SIZES = re.compile(rb"DimSize\s*[=:]([-+\d \t]+)")
_NRRD_DATA = re.compile(rb"data[ \t_-]*file[ \t]*:", re.IGNORECASE)
_NRRD_SIZES = re.compile(rb"sizes[ \t]*:([-+\d \t]+)", re.IGNORECASE)


def check_header(path: Path, ending: str, limits: Limits) -> None:
    """Refuse an image whose header leads to other files or promises more than is accepted.

    A header that makes no sense is left to the reader, which says so in better words.

    Args:
        path: Uploaded file.
        ending: Its ending, which chooses the reader.
        limits: Of the server.

    Raises:
        Refusal: If the image is not to be read.
    """
    if ending in (".nii", ".nii.gz"):
        _check_voxels([_nifti_lengths(path, ending)], limits)
    elif ending in (".mha", ".nrrd"):
        with path.open("rb") as file:
            start = file.read(_LONGEST_HEADER)
        check = _check_meta if ending == ".mha" else _check_nrrd
        check(start, limits)


def _nifti_lengths(path: Path, ending: str) -> list[int]:
    """Return the lengths of all axes; none where the file is no NIfTI."""
    try:
        with GunzipFile(path) if ending == ".nii.gz" else path.open("rb") as file:
            start = file.read(_NIFTI_HEADER)
    except (zlib.error, EOFError):
        return []
    for order in "<>":
        if start[:4] == struct.pack(f"{order}i", 348) and len(start) >= 56:
            count, *lengths = struct.unpack(f"{order}8h", start[40:56])
            return lengths[: max(count, 0)]
        if start[:4] == struct.pack(f"{order}i", 540) and len(start) >= 80:
            count, *lengths = struct.unpack(f"{order}8q", start[16:80])
            return lengths[: max(count, 0)]
    return []


def _check_meta(start: bytes, limits: Limits) -> None:
    position = start.find(_META_DATA)
    if position >= 0 and not _META_LOCAL.match(start, position):
        raise _outside("ElementDataFile")
    if position < 0 and len(start) == _LONGEST_HEADER:
        raise _outside("ElementDataFile")
    _check_voxels(_all_lengths(_META_SIZES, start), limits)


def _check_nrrd(start: bytes, limits: Limits) -> None:
    if _NRRD_DATA.search(start):
        raise _outside("data file")
    _check_voxels(_all_lengths(_NRRD_SIZES, start), limits)


def _outside(field: str) -> Refusal:
    return Refusal(
        422,
        f"the image's header does not say that its voxels are in the same file ({field}); expected "
        "one file that holds both. Save it as one file, for instance .nii.gz.",
    )


def _all_lengths(pattern: re.Pattern[bytes], start: bytes) -> list[list[int]]:
    """Return the lengths of the axes wherever a header tells them: readers choose differently."""
    return [
        [int(number[:20]) for number in re.findall(rb"\d+", match.group(1))]
        for match in pattern.finditer(start)
    ]


def _check_voxels(candidates: list[list[int]], limits: Limits) -> None:
    voxels = max((math.prod(max(n, 1) for n in lengths) for lengths in candidates), default=0)
    if voxels * _BYTES_PER_VOXEL > limits.max_unpacked_bytes:
        raise Refusal(
            413,
            f"the image has {voxels} voxels; expected at most "
            f"{limits.max_unpacked_bytes // _BYTES_PER_VOXEL} "
            f"({size_words(limits.max_unpacked_bytes)} of memory). Cut it to the part that "
            "matters.",
        )
