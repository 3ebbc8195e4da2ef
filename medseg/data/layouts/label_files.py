"""Names of label values from a file that came with the data: tables, ITK-SNAP, dseg.tsv, JSON."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from medseg.data.layouts.description import label_names
from medseg.data.layouts.names import DESCRIPTION, image_name
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


def find_label_names(
    folder: Path, values: Collection[int], cases: Collection[str]
) -> tuple[dict[int, str], list[str]]:
    """Return the names of label values that a file in a folder gives, and what there is to say.

    Files called `labels.csv` hold other things, too: which class each image is of, for instance.
    So a file counts only if it names every value, each once, and none after an image or a case.

    Args:
        folder: Where to look; folders below it are left alone.
        values: Values that occur in the segmentations; 0 needs no name.
        cases: Case ids.

    Returns:
        Value -> name, for those of `values` that are not 0; empty where no file names them.
    """
    needed = sorted(set(values) - {0})
    notes: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name != DESCRIPTION and not _FILE.match(path.name):
            continue
        try:
            names = _read(path)
        except (MedsegError, OSError, UnicodeDecodeError):
            continue
        reason = _objection(names, needed, cases)
        if names and needed and not reason:
            notes.append(f"the labels' names are those of {path.name}")
            return {value: names[value] for value in needed}, notes
        if names and reason:
            notes.append(f"{path.name} does not name the labels: {reason}")
    return {}, notes


def _objection(names: Mapping[int, str], needed: Sequence[int], cases: Collection[str]) -> str:
    """Return why these are not the names of the labels, or nothing."""
    for name in names.values():
        if name in cases or image_name(name) is not None:
            return f"{name!r} is an image or a case"
    lacking = [value for value in needed if value not in names]
    return f"it says nothing about the value {lacking[0]}" if lacking else ""


def _read(path: Path) -> dict[int, str]:
    if path.suffix.lower() == ".json":
        values = read_json(path)
        description = values if isinstance(values, dict) and "labels" in values else None
        labels = label_names(description or {"labels": values}, path).labels
        return {value: name for name, value in labels.items() if isinstance(value, int)}
    return parse_label_lines(path.read_text(encoding="utf-8-sig"))


def parse_label_lines(text: str) -> dict[int, str]:
    """Return value -> name of lines such as "1 liver", "liver: 1" or ITK-SNAP's.

    Nothing is returned where one value has two names, or one name two values.

    Examples:
        >>> parse_label_lines("index\\tname\\n0\\tbackground\\n17\\tLeft hippocampus")
        {0: 'background', 17: 'Left hippocampus'}
        >>> parse_label_lines('  3  255 0 0  1 1 1  "left kidney"')
        {3: 'left kidney'}
    """
    found = (_pair(line) for line in text.splitlines())
    pairs = dict.fromkeys(pair for pair in found if pair is not None)
    values, names = {value for value, _ in pairs}, {name for _, name in pairs}
    return dict(pairs.keys()) if len(values) == len(names) == len(pairs) else {}


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
