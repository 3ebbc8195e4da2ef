"""Files that belong to an image file: its voxels, or its spacing."""

from __future__ import annotations

import re
from pathlib import Path

from medseg.io.image import split_channel

_LONGEST_HEADER = 2**16
_DATA_FILE = re.compile(r"^(?:ElementDataFile\s*=|data ?file:)(.*)$", re.MULTILINE | re.IGNORECASE)


def companions(path: Path) -> list[Path]:
    """Return the files that belong to an image file: its voxels, or its spacing.

    Those of `.hdr`/`.img` pairs, the voxel data that `.mhd` and `.nhdr` name, and the JSON beside
    a TIFF; only files that are there.
    """
    ending = path.suffix.lower()
    names: list[str] = []
    if ending in (".hdr", ".img"):
        names = [path.stem + other for other in (".hdr", ".img", ".HDR", ".IMG")]
    elif ending in (".mhd", ".nhdr") and path.is_file():
        with path.open("rb") as file:
            text = file.read(_LONGEST_HEADER).decode("utf-8", "surrogateescape")
        names = [name.strip() for name in _DATA_FILE.findall(text)]
    elif ending in (".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg"):
        names = [f"{path.stem}.json", f"{split_channel(path.stem)[0]}.json"]
    found = [path.parent / name for name in dict.fromkeys(names) if name != path.name]
    return [file for file in found if file.is_file() and file != path]
