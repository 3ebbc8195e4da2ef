"""The rows of a manifest, as they stand in a table or in JSON, and the settings beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.data.layouts.description import read_object
from medseg.data.layouts.names import DESCRIPTION
from medseg.errors import ConfigError, near_names
from medseg.schema.base import FORMAT_VERSION

CASE, SEGMENTATION, IMAGE, IMAGES = "case", "segmentation", "image", "images"
OPTIONAL = ("group", "fold", "stratum", "annotated_labels")
RESERVED = (CASE, SEGMENTATION, *OPTIONAL)
_KEYS = {
    "format_version", "folder", "channels", "channel_names", "modality", "labels",
    "regions_class_order", "cases", "file_ending", "numTraining", "name", "description",
    "reference", "licence", "license",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One case as the manifest has it."""

    where: str
    """Line or entry, for messages."""
    values: Mapping[str, Any]


def read_table(path: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a table, and its columns."""
    text = _decoded(path)
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns: list[str] = []
    rows = []
    for cells in lines:
        cells = _trimmed(cells)
        if not cells:
            continue
        if not columns:
            columns = [cell.lower() if cell.lower() in RESERVED else cell for cell in cells]
            _check_columns(columns, path)
            continue
        if len(cells) > len(columns):
            raise ConfigError(
                f"{path}, line {lines.line_num}: {len(cells)} cells, but {len(columns)} columns "
                f"({', '.join(columns)}). Put cells that hold {delimiter!r} into quotes."
            )
        filled = {name: cell for name, cell in zip(columns, cells, strict=False) if cell and name}
        rows.append(Row(f"line {lines.line_num}", filled))
    if not columns:
        raise ConfigError(f"{path}: the table is empty; expected a line of column names.")
    return rows, [name for name in columns if name]


def _trimmed(cells: Sequence[str]) -> list[str]:
    """Return the cells up to the last that is filled; spreadsheets write empty ones after it."""
    filled = [cell.strip() for cell in cells]
    while filled and not filled[-1]:
        filled.pop()
    return filled


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not text in UTF-8 (byte {error.start}). Save the table as CSV UTF-8."
        ) from None


def _check_columns(columns: Sequence[str], path: Path) -> None:
    named = [name for name in columns if name]
    twice = sorted({name for name in named if named.count(name) > 1})
    missing = [name for name in (CASE, SEGMENTATION) if name not in named]
    problems = [f"column {name!r} is there twice" for name in twice]
    problems += [f"no column {name!r}" for name in missing]
    if problems:
        raise ConfigError(
            f"{path}: {', '.join(problems)}. The columns are {', '.join(named)}; expected case, "
            f"segmentation, one per channel (or image), and if needed {', '.join(OPTIONAL)}."
        )


def read_entries(values: Any, path: Path) -> list[Row]:
    """Return the cases of a JSON manifest: an object id -> entry, or a list of entries."""
    if isinstance(values, dict):
        pairs = [(f"cases.{case}", entry, {CASE: case}) for case, entry in values.items()]
    elif isinstance(values, list):
        pairs = [(f"cases[{number}]", entry, {}) for number, entry in enumerate(values)]
    else:
        raise ConfigError(f"{path}: cases is {values!r}; expected an object or a list of cases.")
    for where, entry, _ in pairs:
        if not isinstance(entry, dict):
            raise ConfigError(
                f"{path}: {where} is {entry!r}; expected an object such as "
                '{"images": ["a_t1.nii.gz"], "segmentation": "a_seg.nii.gz"}.'
            )
    return [Row(where, {**identity, **entry}) for where, entry, identity in pairs]


def settings_beside(path: Path) -> dict[str, Any]:
    """Return the JSON that holds the labels of a table."""
    beside = path.with_suffix(".json")
    for file in (beside, path.with_name(DESCRIPTION)):
        if file != path and file.is_file():
            return read_object(file)
    raise ConfigError(
        f"{path}: a table does not say what the labels are, and neither {beside.name} nor "
        f"{DESCRIPTION} lies beside it. Write one that does: "
        '{"labels": {"background": 0, "liver": 1}}, or let it be written: '
        f"medseg dataset init {path}"
    )


def check_keys(description: Mapping[str, Any], path: Path) -> None:
    version = description.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ConfigError(
            f"{path}: format_version is {version!r}, this medseg reads up to {FORMAT_VERSION}. "
            "Update medseg to read this file."
        )
    unknown = sorted(set(description) - _KEYS)
    if unknown:
        hints = "".join(near_names(key, sorted(_KEYS)) for key in unknown[:1])
        raise ConfigError(
            f"{path}: unknown {', '.join(repr(key) for key in unknown)}; expected folder, "
            f"channels, labels, regions_class_order and cases.{hints}"
        )
