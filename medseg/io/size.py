"""How large an image is once unpacked, told without unpacking it."""

from __future__ import annotations

from pathlib import Path

from medseg.io.companions import companions

_LARGEST_RATIO = 1032
"""How much larger than its packed form the content of a gzip file can be (zlib's own figure)."""
_PACKED = {".png": 4, ".jpg": 12, ".jpeg": 12}
_PACKED |= dict.fromkeys((".nrrd", ".mha", ".tif", ".tiff", ".zraw"), 3)
"""Endings of files that may be packed -> how much larger their content may be."""


def stored_bytes(path: Path) -> int:
    """Return roughly the bytes of voxel data in an image file; 0 where it cannot be read.

    Files that belong to it count: the voxels beside a header, those of a folder (a DICOM series).
    Gzip files say it in their last four bytes (modulo 4 GiB, which is why the larger of that and
    the file's own size is taken).
    """
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        return sum(_unpacked(file) for file in (path, *companions(path)))
    except OSError:
        return 0


def _unpacked(path: Path) -> int:
    """Return roughly the bytes of one file once unpacked."""
    size = path.stat().st_size
    if path.suffix.lower() == ".gz" and size >= 4:
        with path.open("rb") as file:
            file.seek(-4, 2)
            told = int.from_bytes(file.read(4), "little")
        return max(size, min(told, _LARGEST_RATIO * size))  # a file cut short tells anything
    return size * _PACKED.get(path.suffix.lower(), 1)
