"""A corrected copy of a dataset: what can be corrected safely is, the rest is copied as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.check.files import companions
from medseg.check.grids import Turn, turn_onto
from medseg.check.intensities import convert
from medseg.check.segmentation import NotIntegers, as_integers
from medseg.data.layouts.names import MANIFEST, TABLE_ENDINGS
from medseg.errors import ConfigError, MedsegError
from medseg.io.colour import one_channel
from medseg.io.image import Stored
from medseg.io.read import read_stored
from medseg.io.write import write_image, write_segmentation
from medseg.schema.base import FORMAT_VERSION, write_json
from medseg.schema.check import CheckReport, Problem
from medseg.schema.dataset import CaseFiles, DatasetSpec

_PLACES = {"spacing", "origin", "direction"}


def require_empty(out: Path, spec: DatasetSpec) -> None:
    """Check that a corrected copy can be written.

    Raises:
        ConfigError: If the folder holds something, or lies in the dataset.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out}: is there already; expected a new or empty folder for the corrected copy. "
            "Name another one."
        )
    source = Path(spec.source).resolve()
    if source in (out.resolve(), *out.resolve().parents):
        raise ConfigError(
            f"{out}: lies in the dataset {source}, which is never changed. Name another folder."
        )


def write_fixed(spec: DatasetSpec, report: CheckReport, out: Path) -> tuple[str, ...]:
    """Write a corrected copy of a dataset; the original is only read.

    Files keep their names. They are copies, not links: who edits one leaves the original alone.
    A dataset whose files do not all lie in its folder gets a manifest.

    Args:
        spec: The dataset.
        report: What was found in it; problems with a `fix` are corrected.
        out: New or empty folder.

    Returns:
        What could not be corrected after all, in words; those files are copied.

    Raises:
        ConfigError: If the folder holds something.
    """
    require_empty(out, spec)
    root = Path(spec.source)
    names = _target_names(spec, root)
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for case, entry in spec.cases.items():
        problems = report.cases[case].problems if case in report.cases else ()
        for name in _files(entry):
            target, source = out / names[name], root / name
            fixable = [p for p in problems if p.file == name and p.fix is not None]
            if target.exists() or not source.is_file():
                continue
            try:
                if fixable:
                    _correct(root, entry, name, fixable, target)
                    continue
            except (MedsegError, OSError) as error:
                failed.append(f"{name}: not corrected ({error})")
            _copy(source, target)
    _describe(spec, names, out)
    return tuple(failed)


def _files(entry: CaseFiles) -> tuple[str, ...]:
    return (*entry.channels, *([entry.segmentation] if entry.segmentation else []))


def _target_names(spec: DatasetSpec, root: Path) -> dict[str, str]:
    """Return file -> its place in the copy: the same, or below `files` where it lies outside."""
    base = os.path.normpath(root)
    names: dict[str, str] = {}
    for case, entry in spec.cases.items():
        for name in _files(entry):
            path = os.path.normpath(root / name)
            inside = path.startswith(base + os.sep)
            relative = os.path.relpath(path, base) if inside else f"files/{case}/{Path(name).name}"
            number = 1
            while relative in names.values() and names.get(name) != relative and not inside:
                number += 1
                relative = f"files/{case}/{number}/{Path(name).name}"
            names.setdefault(name, Path(relative).as_posix())
    return names


def _copy(source: Path, target: Path) -> None:
    """Copy a file and what belongs to it, each whole or not at all."""
    for path in (source, *companions(source)):
        place = target.with_name(path.name) if path != source else target
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.part")
        shutil.copyfile(path, part)
        os.replace(part, place)


def _correct(
    root: Path, entry: CaseFiles, name: str, problems: Sequence[Problem], target: Path
) -> None:
    """Write one file with its problems corrected."""
    codes = {problem.code for problem in problems}
    stored = read_stored(root / name)
    header = stored.header
    if codes & (_PLACES | {"orientation"}):
        header = read_stored(root / _first(entry, root)).header
    if name == entry.segmentation:
        labels = _labels(stored)
        if labels is not None:
            turn = turn_onto(header.grid, stored.header.grid) if "orientation" in codes else None
            write_segmentation(target, _turned(labels, turn), header)
            return
    write_image(target, _intensities(stored), header)


def _first(entry: CaseFiles, root: Path) -> str:
    """Return the channel file that gives the grid: the first that can be read."""
    for name in entry.channels[:-1]:
        try:
            read_stored(root / name)
        except MedsegError:
            continue
        return name
    return entry.channels[-1]


def _labels(stored: Stored) -> NDArray[np.integer[Any]] | None:
    single = stored if stored.array.ndim == 3 else one_channel(stored)
    labels = None if single is None else as_integers(single)
    return None if isinstance(labels, NotIntegers) else labels


def _turned(labels: NDArray[np.integer[Any]], turn: Turn | None) -> NDArray[np.integer[Any]]:
    if turn is None:
        return labels
    axes, flips = turn
    return np.flip(labels.transpose(axes), tuple(d for d, flip in enumerate(flips) if flip))


def _intensities(stored: Stored) -> NDArray[Any]:
    """Return a volume as it is to be written: unscaled, in the byte order of this machine."""
    if (stored.slope, stored.inter) == (1.0, 0.0):
        return stored.array.astype(stored.array.dtype.newbyteorder("="), copy=False)
    values = np.empty(stored.array.shape, dtype=np.float32, order="F")
    convert(stored.array, values, slope=stored.slope, inter=stored.inter)
    return values


def _describe(spec: DatasetSpec, names: Mapping[str, str], out: Path) -> None:
    """Copy the description with the tables beside it, or write a manifest."""
    root, description = Path(spec.source), Path(spec.description)
    moved = any(Path(name).as_posix() != place for name, place in names.items())
    if not moved and description.is_file() and description.resolve().parent == root.resolve():
        for path in sorted(root.iterdir()):
            if path.is_file() and path.suffix.lower() in (".json", *TABLE_ENDINGS):
                _copy(path, out / path.name)
        return
    write_json(out / MANIFEST, _manifest(spec, names))


def _manifest(spec: DatasetSpec, names: Mapping[str, str]) -> dict[str, Any]:
    labels: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in spec.labels.items()
    }
    if spec.ignore_label is not None:
        labels["ignore"] = spec.ignore_label
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "channels": list(spec.channels),
        "labels": labels,
    }
    if spec.regions_class_order is not None:
        values["regions_class_order"] = list(spec.regions_class_order)
    values["cases"] = {case: _entry(entry, names) for case, entry in spec.cases.items()}
    return values


def _entry(entry: CaseFiles, names: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {"images": [names[name] for name in entry.channels]}
    if entry.segmentation is not None:
        values["segmentation"] = names[entry.segmentation]
    rest: dict[str, Any] = {"group": entry.group, "fold": entry.fold, "stratum": entry.stratum}
    if entry.annotated_labels is not None:
        rest["annotated_labels"] = list(entry.annotated_labels)
    return values | {key: value for key, value in rest.items() if value is not None}
