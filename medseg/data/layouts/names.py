"""What the names of files say: ending, case, channel; and which file describes a folder."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from medseg.io.image import ENDINGS, PICTURE_ENDINGS, TIFF_ENDINGS, split_channel, split_ending

MANIFEST = "medseg.json"
"""The manifest that `dataset init` writes."""
MANIFESTS = (MANIFEST, "medseg.csv", "medseg.tsv")
"""Manifests that are found in a folder, the first one wins."""
DESCRIPTION = "dataset.json"
"""The description of nnU-Net's raw and of the Decathlon layout."""
TABLE_ENDINGS = (".csv", ".tsv", ".txt")
"""Endings of a manifest that is a table."""
RASTER_ENDINGS = (*PICTURE_ENDINGS, *TIFF_ENDINGS)
"""Endings of pictures, which may hold several channels (RGB) in one file."""

_IMAGE = re.compile(
    rf"(?P<stem>.+?)(?P<ending>{'|'.join(map(re.escape, ENDINGS))})", re.IGNORECASE | re.DOTALL
)
_PLAIN_STEMS = {"medseg", "manifest", "dataset"}


def describing_file(path: Path) -> Path | None:
    """Return the file that describes a folder, or `path` itself if it is a file; None: nothing."""
    if path.is_file():
        return path
    candidates = (path / name for name in (*MANIFESTS, DESCRIPTION))
    return next((file for file in candidates if file.is_file()), None)


def dataset_name(path: Path) -> str:
    """Return the name of the dataset that a folder or a manifest holds.

    It is that of the folder, or of a manifest whose name says more than "manifest".

    Examples:
        >>> dataset_name(Path("/data/Task04_Hippocampus/medseg.json"))
        'Task04_Hippocampus'
        >>> dataset_name(Path("/data/lists/liver_2024.csv"))
        'liver_2024'
    """
    if path.suffix.lower() not in (".json", *TABLE_ENDINGS):
        return path.name
    return path.parent.name if path.stem.lower() in _PLAIN_STEMS else path.stem


def image_name(name: str) -> tuple[str, str] | None:
    """Return stem and ending of an image file's name; None if it is no image.

    Examples:
        >>> image_name("a.T1.nii.gz"), image_name("notes.txt")
        (('a.T1', '.nii.gz'), None)
    """
    match = _IMAGE.fullmatch(name)
    if match is None:
        return None
    stem = match["stem"]
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem), match["ending"].lower()


def may_hold_channels(name: str, case: str) -> bool:
    """Return whether a file may hold several channels of its case.

    A picture may (RGB), and a file that is not numbered as one channel of several.
    """
    if name.lower().endswith(RASTER_ENDINGS):
        return True
    found = image_name(name.rpartition("/")[2])
    return found is None or found[0] == case or split_channel(found[0])[1] is None


def group_channels(paths: list[Path]) -> dict[str, list[tuple[int, Path]]]:
    """Group image files into cases: `CASE_NNNN.ending` is channel NNNN, no suffix channel 0.

    Returns:
        Case id -> [(channel number, file)], both sorted.
    """
    cases: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(paths):
        case, channel = split_channel(split_ending(path.name)[0])
        cases.setdefault(case, []).append((channel or 0, path))
    return {case: sorted(files) for case, files in sorted(cases.items())}


def plain_name(name: str) -> str:
    """Return a file name as it is kept: "/" between its parts, no "./" in front.

    Examples:
        >>> plain_name("./imagesTr/a.nii.gz"), plain_name("images\\\\a.png")
        ('imagesTr/a.nii.gz', 'images/a.png')
    """
    name = name.strip().replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def fold_pairs(names: list[str]) -> list[str]:
    """Return image files, an Analyze pair counted once (by its `.hdr`)."""
    present = set(names)
    return [
        name for name in names if not (name.lower().endswith(".img") and _header_of(name) & present)
    ]


def _header_of(name: str) -> set[str]:
    return {name[:-4] + ending for ending in (".hdr", ".HDR")}
