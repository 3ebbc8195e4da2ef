"""How large an image is once unpacked, told without unpacking it."""

from __future__ import annotations

from pathlib import Path

_PACKED = {".png": 4, ".jpg": 12, ".jpeg": 12, ".nrrd": 3, ".mha": 3, ".tif": 3, ".tiff": 3}
"""Endings of files that may be packed -> how much larger their content may be."""


def stored_bytes(path: Path) -> int:
    """Return roughly the bytes of voxel data in a file; 0 where it cannot be read.

    Gzip files say it in their last four bytes (modulo 4 GiB, which is why the larger of that and
    the file's own size is taken).
    """
    try:
        size = path.stat().st_size
        if path.suffix.lower() == ".gz" and size >= 4:
            with path.open("rb") as file:
                file.seek(-4, 2)
                return max(size, int.from_bytes(file.read(4), "little"))
    except OSError:
        return 0
    return size * _PACKED.get(path.suffix.lower(), 1)
