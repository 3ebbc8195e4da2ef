"""A manifest: a table, or JSON, with one row a case.

The columns are `case`, one per channel (or `image`, for a file that holds them all), and
`segmentation`; `group`, `fold`, `stratum` and `annotated_labels` where there is something to say.
The labels stand in the JSON, or in one beside the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.data.layouts.described import Described, LabelNames, problem, remark
from medseg.data.layouts.description import channel_names, label_names, read_object
from medseg.data.layouts.listing import Listing
from medseg.data.layouts.names import image_name, plain_name
from medseg.data.layouts.rows import (
    CASE,
    IMAGE,
    IMAGES,
    RESERVED,
    SEGMENTATION,
    Row,
    check_keys,
    read_entries,
    read_table,
    settings_beside,
)
from medseg.errors import ConfigError, DatasetError, near_names
from medseg.schema.base import FORMAT_VERSION, read_json
from medseg.schema.check import Problem
from medseg.schema.dataset import CaseFiles

_LIST_SEPARATOR = re.compile(r"\s*[|;]\s*")
_MAX_LISTED = 8


@dataclass(slots=True)
class _Reader:
    """Rows on their way to cases, and what was wrong with them."""

    path: Path
    channels: tuple[str, ...]
    problems: list[Problem] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)

    def wrong(self, row: Row, message: str, case: str | None = None) -> None:
        """Note what is wrong with a row."""
        self.problems.append(problem("manifest", f"{row.where}: {message}", case=case))


def read_manifest(path: Path) -> Described:
    """Return what a manifest says.

    Raises:
        ConfigError: If it is not usable as a whole; what is wrong with single rows is gathered in
            `Described.problems`.
    """
    if path.suffix.lower() == ".json":
        return _read_json_manifest(path)
    rows, columns = read_table(path)
    return _described(settings_beside(path), rows, path, columns)


def read_listed(path: Path) -> Described:
    """Return the cases of a table that has no labels beside it; the labels are yet to be found.

    Raises:
        ConfigError: If it is not usable as a whole.
        DatasetError: With everything that is wrong with its rows.
    """
    rows, columns = read_table(path)
    described = _described({"labels": {"background": 0}}, rows, path, columns)
    errors = [found.message for found in described.problems if found.level == "error"]
    if errors or not described.cases:
        raise DatasetError("\n".join([f"{path}:", *(errors or ["no case with a segmentation"])]))
    return described


def is_manifest(values: Any) -> bool:
    """Return whether what was read from a JSON file is a manifest."""
    return isinstance(values, list) or (isinstance(values, dict) and "cases" in values)


def manifest_values(
    channels: Sequence[str], names: LabelNames, cases: Mapping[str, CaseFiles]
) -> dict[str, Any]:
    """Return the content of a manifest in JSON that `read_manifest` reads as these cases."""
    labels: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in names.labels.items()
    }
    if names.ignore_label is not None:
        labels["ignore"] = names.ignore_label
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "channels": list(channels),
        "labels": labels,
    }
    if names.regions_class_order is not None:
        values["regions_class_order"] = list(names.regions_class_order)
    values["cases"] = {
        case: {
            "images": list(files.channels),
            **files.model_dump(mode="json", exclude={"channels"}, exclude_none=True),
        }
        for case, files in cases.items()
    }
    return values


def _read_json_manifest(path: Path) -> Described:
    values = read_json(path)
    if isinstance(values, list):
        return _described(settings_beside(path), read_entries(values, path), path)
    description = read_object(path)
    check_keys(description, path)
    return _described(description, read_entries(description["cases"], path), path)


def _described(
    description: dict[str, Any],
    rows: Sequence[Row],
    path: Path,
    columns: Sequence[str] | None = None,
) -> Described:
    reader = _Reader(path, ())
    reader.channels = _channels(description, rows, columns, reader)
    if columns is not None:
        _remark_unread(columns, reader)
    cases: dict[str, CaseFiles] = {}
    seen: dict[str, str] = {}
    for row in rows:
        case = _case_id(row, reader)
        if case is None:
            continue
        if case in seen:
            reader.wrong(row, f"case {case!r} was there already ({seen[case]}). Keep one.", case)
            continue
        seen[case] = row.where
        files = _files(row, case, reader, is_table=columns is not None)
        if files is not None:
            cases[case] = files
    if reader.unlabelled:
        listed = ", ".join(reader.unlabelled[:_MAX_LISTED])
        more = ", ..." if len(reader.unlabelled) > _MAX_LISTED else ""
        text = f"without a segmentation and out of training: {listed}{more}"
        reader.problems.append(remark("unlabelled", f"cases {text}"))
    root = _root(description, path)
    return Described(
        source=path,
        root=root,
        channels=reader.channels,
        names=label_names(description, path),
        cases=cases,
        listing=Listing(root),
        lists_files=True,
        problems=tuple(reader.problems),
    )


def _root(description: Mapping[str, Any], path: Path) -> Path:
    folder = description.get("folder", "")
    if not isinstance(folder, str):
        raise ConfigError(f"{path}: folder is {folder!r}; expected the path of a folder.")
    return path.parent / folder


def _channels(
    description: dict[str, Any],
    rows: Sequence[Row],
    columns: Sequence[str] | None,
    reader: _Reader,
) -> tuple[str, ...]:
    """Return the channels: those listed, or else the columns that name images."""
    path = reader.path
    listed = description.get("channels")
    if listed is not None:
        if not isinstance(listed, list) or not listed or len(set(map(str, listed))) < len(listed):
            raise ConfigError(
                f"{path}: channels is {listed!r}; expected a list of different names such as "
                '["T1w", "FLAIR"].'
            )
        channels = tuple(str(name) for name in listed)
    elif "channel_names" in description or "modality" in description:
        channels = channel_names(description, path)
    else:
        return _image_columns(rows, columns, reader)
    missing = [name for name in channels if columns is not None and name not in columns]
    if missing and columns is not None and not {IMAGE, IMAGES} & set(columns):
        raise ConfigError(
            f"{path}: no column for the channels {', '.join(missing)}; the columns are "
            f"{', '.join(columns)}. Name one column after each channel, or 'image' a column of "
            "files that hold all of them."
        )
    return channels


def _image_columns(
    rows: Sequence[Row], columns: Sequence[str] | None, reader: _Reader
) -> tuple[str, ...]:
    names = columns or list(dict.fromkeys(key for row in rows for key in row.values))
    free = [name for name in names if name not in (*RESERVED, IMAGES)]
    channels = tuple(
        name for name in free if any(image_name(str(row.values.get(name, ""))) for row in rows)
    )
    if not channels:
        raise ConfigError(
            f"{reader.path}: it names no channel; expected a column of image files per channel, "
            "such as T1w, or 'image' where there is one, or a list 'channels' in the JSON."
        )
    return channels


def _remark_unread(columns: Sequence[str], reader: _Reader) -> None:
    """Say which columns of a table are not read, and what a misspelt one may mean."""
    known = (*RESERVED, IMAGE, IMAGES, *reader.channels)
    unread = [name for name in columns if name not in known]
    if unread:
        hints = "".join(near_names(name, list(RESERVED)) for name in unread)
        text = f"columns that are not read: {', '.join(unread)}.{hints}"
        reader.problems.append(remark("manifest", text))


def _case_id(row: Row, reader: _Reader) -> str | None:
    value = row.values.get(CASE)
    case = str(value).strip() if isinstance(value, (str, int)) else ""
    if not case:
        reader.wrong(row, "no case id. Give every case a name of its own.")
        return None
    if re.search(r'[/\\:*?"<>|\x00-\x1f]', case) or case.startswith("."):
        reader.wrong(
            row,
            f"the case id is {case!r}; predictions are files of this name, so it holds none of "
            '/ \\ : * ? " < > | and does not begin with a dot. Rename the case.',
        )
        return None
    return case


def _files(row: Row, case: str, reader: _Reader, *, is_table: bool) -> CaseFiles | None:
    """Return the files of a row; None if something is wrong or it has no segmentation."""
    before = len(reader.problems)
    channels = _images(row, case, reader)
    segmentation = row.values.get(SEGMENTATION)
    if segmentation is not None and not isinstance(segmentation, str):
        reader.wrong(row, f"segmentation is {segmentation!r}; expected a file.", case)
    fold, annotated = _fold(row, case, reader), _annotated(row, case, reader)
    if not is_table:
        known = (*RESERVED, IMAGE, IMAGES, *reader.channels)
        for key in (key for key in row.values if key not in known):
            reader.wrong(row, f"unknown {key!r}.{near_names(key, list(known))}", case)
    if len(reader.problems) > before:
        return None
    if not segmentation:
        reader.unlabelled.append(case)
        return None
    return CaseFiles(
        channels=channels,
        segmentation=plain_name(str(segmentation)),
        group=_text(row, "group"),
        fold=fold,
        stratum=_text(row, "stratum"),
        annotated_labels=annotated,
    )


def _images(row: Row, case: str, reader: _Reader) -> tuple[str, ...]:
    """Return the image files of a row, in the order of the channels."""
    given = row.values.get(IMAGES)
    if isinstance(given, dict):
        values: list[Any] = _by_channel(given, row, case, reader)
    elif given is not None:
        values = given if isinstance(given, list) else [given]
    elif IMAGE in row.values and IMAGE not in reader.channels:
        values = [row.values[IMAGE]]
    else:
        values = _by_channel(row.values, row, case, reader)
    wrong = [value for value in values if not isinstance(value, str) or not value.strip()]
    if wrong or not values:
        reader.wrong(row, f"its images are {values!r}; expected the names of files.", case)
        return ()
    return tuple(plain_name(value) for value in values)


def _by_channel(values: Mapping[str, Any], row: Row, case: str, reader: _Reader) -> list[Any]:
    missing = [name for name in reader.channels if not values.get(name)]
    if missing:
        reader.wrong(row, f"no image for {', '.join(missing)} (case {case!r}).", case)
        return ["-"]
    return [values[name] for name in reader.channels]


def _text(row: Row, key: str) -> str | None:
    value = row.values.get(key)
    return None if value is None or value == "" else str(value).strip()


def _fold(row: Row, case: str, reader: _Reader) -> int | None:
    value = _text(row, "fold")
    if value is None:
        return None
    if not re.fullmatch(r"\d+(\.0+)?", value):
        reader.wrong(row, f"fold is {value!r}; expected a number from 0 up.", case)
        return None
    return int(float(value))


def _annotated(row: Row, case: str, reader: _Reader) -> tuple[str, ...] | None:
    """Return the labels drawn in a case: a list, or "liver|spleen"; None: all of them."""
    value = row.values.get("annotated_labels")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return tuple(name for name in _LIST_SEPARATOR.split(value.strip()) if name)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    reader.wrong(row, f"annotated_labels is {value!r}; expected names of labels.", case)
    return None
