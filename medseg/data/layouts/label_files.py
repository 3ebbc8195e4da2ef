"""Names of label values from a file that came with the data: tables, ITK-SNAP, dseg.tsv, JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from medseg.data.layouts.description import label_names
from medseg.data.layouts.names import DESCRIPTION
from medseg.errors import MedsegError
from medseg.schema.base import read_json

_FILE = re.compile(
    r"^(.*[_\-. ])?(labels?|label[_\-. ]?(names|map)|classes|class[_\-. ]?names|lut|dseg)"
    r"\.(txt|tsv|csv|json|ctbl|label)$",
    re.IGNORECASE,
)
_VALUE_FIRST = re.compile(r"^\s*(-?\d+)\s*[:=,;\t ]\s*(.+?)\s*$")
_VALUE_LAST = re.compile(r"^\s*([^\d\s#].*?)\s*[:=,;\t ]\s*(-?\d+)\s*$")
_QUOTED = re.compile(r'"([^"]+)"')
_WORD = re.compile(r"[^\s,;\t]*[^\W\d_][^,;\t]*")
_COLOUR = re.compile(r"(\s+[\d.]+){3,}\s*$")


def find_label_names(folder: Path) -> tuple[Mapping[int, str], Path] | None:
    """Return value -> name, and the file that says so; None where no file does."""
    for path in sorted(folder.iterdir()):
        if path.name == DESCRIPTION or _FILE.match(path.name):
            try:
                names = _read(path)
            except (MedsegError, OSError, UnicodeDecodeError):
                continue
            if names:
                return names, path
    return None


def _read(path: Path) -> dict[int, str]:
    if path.suffix.lower() == ".json":
        values = read_json(path)
        description = values if isinstance(values, dict) and "labels" in values else None
        labels = label_names(description or {"labels": values}, path).labels
        return {value: name for name, value in labels.items() if isinstance(value, int)}
    return parse_label_lines(path.read_text(encoding="utf-8-sig"))


def parse_label_lines(text: str) -> dict[int, str]:
    """Return value -> name of lines such as "1 liver", "liver: 1" or ITK-SNAP's.

    Examples:
        >>> parse_label_lines("index\\tname\\n0\\tbackground\\n17\\tLeft hippocampus")
        {0: 'background', 17: 'Left hippocampus'}
        >>> parse_label_lines('  3  255 0 0  1 1 1  "left kidney"')
        {3: 'left kidney'}
    """
    names: dict[int, str] = {}
    for line in text.splitlines():
        pair = _pair(line)
        if pair is not None and pair[1] not in names.values():
            names.setdefault(*pair)
    return names


def _pair(line: str) -> tuple[int, str] | None:
    if line.lstrip().startswith("#"):
        return None
    match = _VALUE_FIRST.match(line)
    if match:
        rest = _COLOUR.sub("", match[2])
        name = _QUOTED.search(rest) or _WORD.search(rest)
        return (int(match[1]), name[name.lastindex or 0].strip()) if name else None
    match = _VALUE_LAST.match(line)
    return (int(match[2]), match[1].strip()) if match else None
