"""Read the description of a dataset, of any layout, into a `DatasetSpec`."""

from __future__ import annotations

import logging
from pathlib import Path

from medseg.data.layouts.described import Described, problem
from medseg.data.layouts.description import parse_labels, read_object
from medseg.data.layouts.listed import read_decathlon, read_dictionary
from medseg.data.layouts.manifest import is_manifest, read_manifest
from medseg.data.layouts.names import (
    DESCRIPTION,
    MANIFESTS,
    TABLE_ENDINGS,
    dataset_name,
    describing_file,
    group_channels,
    may_hold_channels,
)
from medseg.data.layouts.raw import read_raw
from medseg.errors import DatasetError
from medseg.labels import LabelScheme
from medseg.schema.base import read_json
from medseg.schema.check import Problem
from medseg.schema.dataset import CaseFiles, DatasetSpec

__all__ = ["group_channels", "parse_labels", "read_dataset", "scan_dataset"]

logger = logging.getLogger(__name__)

_MAX_LISTED = 20


def read_dataset(path: Path) -> DatasetSpec:
    """Return what a dataset holds; images are listed, not opened.

    Args:
        path: Folder with a manifest (`medseg.json`, `medseg.csv`, `medseg.tsv`) or with a
            `dataset.json` (nnU-Net raw or Decathlon); or a manifest, whatever it is called.

    Raises:
        DatasetError: If files are missing; all problems of all cases are listed at once.
        ConfigError: If the description is not usable.
    """
    spec, problems = scan_dataset(path)
    errors = [found for found in problems if found.level == "error"]
    if errors:
        _refuse(Path(path), errors)
    for found in problems:
        logger.warning("%s: %s", path, found.message)
    return spec


def scan_dataset(path: Path) -> tuple[DatasetSpec, tuple[Problem, ...]]:
    """Return what a dataset holds as far as it can be told, and every problem with its files.

    Cases with problems are in the spec, too, if all of their files are at least named.

    Raises:
        DatasetError: If there is no description, or no case.
        ConfigError: If the description is not usable.
    """
    described = _read(_description(Path(path)))
    root = described.root.resolve()
    names = described.names
    cases, misnamed = _named_in_text(described.cases)
    spec = DatasetSpec(
        name=dataset_name(described.source.resolve()),
        source=str(root),
        description=str(described.source.resolve()),
        channels=described.channels,
        labels=names.labels,
        regions_class_order=names.regions_class_order,
        ignore_label=names.ignore_label,
        cases=dict(sorted(cases.items())),
    )
    LabelScheme.from_spec(spec)
    problems = (*described.problems, *misnamed, *_file_problems(described, spec))
    if not spec.cases and all(found.level == "warning" for found in problems):
        raise DatasetError(f"{path}: the dataset has no training case. Add images and labels.")
    return spec, problems


def _named_in_text(cases: dict[str, CaseFiles]) -> tuple[dict[str, CaseFiles], list[Problem]]:
    """Return the cases whose names are text, and a problem for each of the others."""
    kept, problems = {}, []
    for case, files in cases.items():
        names = (case, *files.channels, files.segmentation or "")
        wrong = [name for name in names if name != name.encode(errors="ignore").decode()]
        if not wrong:
            kept[case] = files
            continue
        shown, shown_case = (
            name.encode(errors="backslashreplace").decode() for name in (wrong[-1], case)
        )
        text = f"{shown}: its name is not in UTF-8, so no report can hold it. Rename the file."
        problems.append(problem("name", text, case=shown_case, file=shown))
    return kept, problems


def _description(path: Path) -> Path:
    """Return the file that describes the dataset at a path."""
    if not path.exists():
        raise DatasetError(f"{path}: no such folder. Give a folder that holds dataset.json.")
    found = describing_file(path)
    if found is not None:
        return found
    entries = sorted(entry.name for entry in path.iterdir())[:8]
    held = f"it holds {', '.join(entries)}" if entries else "it is empty"
    raise DatasetError(
        f"{path}: no dataset.json there, and no {' or '.join(MANIFESTS)} ({held}). Expected the "
        "nnU-Net raw layout (dataset.json, imagesTr, labelsTr), the Decathlon layout or a "
        f"manifest. For any other folder of images and segmentations: medseg dataset init {path}"
    )


def _read(path: Path) -> Described:
    """Read a description by its kind."""
    if path.suffix.lower() in TABLE_ENDINGS:
        return read_manifest(path)
    if path.suffix.lower() != ".json":
        raise DatasetError(
            f"{path}: expected a folder, or a manifest that ends in .json, .csv or .tsv."
        )
    if path.name != DESCRIPTION:
        tables = [path.with_suffix(ending) for ending in TABLE_ENDINGS]
        if is_manifest(read_json(path)):
            return read_manifest(path)
        if table := next((table for table in tables if table.is_file()), None):
            return read_manifest(table)
    description = read_object(path)
    if isinstance(description.get("training"), list):
        return read_decathlon(description, path)
    if isinstance(description.get("dataset"), dict):
        return read_dictionary(description, path)
    return read_raw(description, path)


def _file_problems(described: Described, spec: DatasetSpec) -> list[Problem]:
    problems = []
    for case, files in spec.cases.items():
        problems += _image_problems(case, files, described, spec)
        if files.segmentation is None:
            problems.append(
                problem("missing-segmentation", "no segmentation in labelsTr", case=case)
            )
        elif not described.listing.has_file(files.segmentation):
            text = f"{_missing(described.root, files.segmentation)} (segmentation)"
            problems.append(problem("missing-file", text, case=case, file=files.segmentation))
    return problems


def _image_problems(
    case: str, files: CaseFiles, described: Described, spec: DatasetSpec
) -> list[Problem]:
    """Check the number of files, and that they are there."""
    problems = []
    count = len(files.channels)
    may_stack = count < len(spec.channels) and (
        (described.lists_files and count == 1)
        or all(may_hold_channels(name, case) for name in files.channels)
    )
    if count != len(spec.channels) and not may_stack:
        text = f"{count} channel file{'' if count == 1 else 's'}, expected {len(spec.channels)}"
        problems.append(problem("channel-count", f"{text} ({', '.join(spec.channels)})", case=case))
    for number, file in enumerate(files.channels):
        if not described.listing.has_file(file):
            named = number < len(spec.channels)
            which = f"channel {number}, {spec.channels[number]}" if named else f"channel {number}"
            text = f"{_missing(described.root, file)} ({which})"
            problems.append(problem("missing-file", text, case=case, file=file))
    return problems


def _missing(root: Path, file: str) -> str:
    if (root / file).is_dir():
        return f"{file} is a folder; expected an image file"
    if (root / file).is_symlink():
        return f"{file} is a link to a file that is missing"
    if "$" in file or file.startswith(("~", "%")):
        return f"{file} is missing: variables are not replaced, write the path itself"
    return f"{file} is missing"


def _refuse(path: Path, problems: list[Problem]) -> None:
    lines = [
        f"  case {found.case!r}: {found.message}" if found.case else f"  {found.message}"
        for found in problems
    ]
    shown = lines[:_MAX_LISTED]
    if len(lines) > _MAX_LISTED:
        shown.append(f"  ... and {len(lines) - _MAX_LISTED} more")
    count = f"{len(lines)} problem{'' if len(lines) == 1 else 's'}"
    advice = "Add the files, or remove the cases from the dataset."
    raise DatasetError("\n".join([f"{path}: {count}", *shown, advice]))
