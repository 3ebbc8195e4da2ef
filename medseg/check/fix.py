"""A corrected copy of a dataset: what can be corrected safely is, the rest is copied as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.check.grids import Turn, turn_onto
from medseg.check.intensities import convert
from medseg.data.layouts.described import LabelNames
from medseg.data.layouts.manifest import manifest_values
from medseg.data.layouts.names import MANIFEST, TABLE_ENDINGS
from medseg.errors import ConfigError, DatasetError, MedsegError
from medseg.io.colour import one_channel
from medseg.io.companions import companions
from medseg.io.image import Stored
from medseg.io.integers import NotIntegers, as_integers
from medseg.io.read import read_stored
from medseg.io.write import write_image, write_segmentation
from medseg.schema.base import write_json
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What became of the corrections."""

    done: tuple[Problem, ...]
    """Problems that the copy no longer has."""
    failed: tuple[str, ...]
    """Files that could not be corrected or copied after all, in words."""


def write_fixed(spec: DatasetSpec, report: CheckReport, out: Path) -> Fixed:
    """Write a corrected copy of a dataset; the original is only read.

    Files keep their names. They are copies, not links: who edits one leaves the original alone.
    A dataset whose files do not all lie in its folder gets a manifest.

    Args:
        spec: The dataset.
        report: What was found in it; problems with a `fix` are corrected.
        out: New or empty folder.

    Returns:
        What was corrected, and what was not after all; those files are copied.

    Raises:
        ConfigError: If the folder holds something.
    """
    require_empty(out, spec)
    root = Path(spec.source)
    names = _target_names(spec, root)
    out.mkdir(parents=True, exist_ok=True)
    done: list[Problem] = []
    failed: list[str] = []
    for case, entry in spec.cases.items():
        problems = report.cases[case].problems if case in report.cases else ()
        for name in entry.files:
            target, source = out / names[name], root / name
            fixable = [p for p in problems if p.file == name and p.fix is not None]
            if target.exists():
                treated = {(p.file, p.code) for p in done}
                done += [p for p in fixable if (p.file, p.code) in treated]
            elif source.is_file():
                done += _put(root, entry, name, fixable, target, failed=failed)
    _describe(spec, names, out)
    return Fixed(done=tuple(done), failed=tuple(failed))


def _put(
    root: Path,
    entry: CaseFiles,
    name: str,
    fixable: Sequence[Problem],
    target: Path,
    *,
    failed: list[str],
) -> Sequence[Problem]:
    """Write one file of the copy, corrected or as it is; return the problems it is rid of."""
    if fixable:
        try:
            _correct(root, entry, name, fixable, target)
            return fixable
        except (MedsegError, OSError) as error:
            failed.append(f"{name}: not corrected ({error})")
    try:
        _copy_image(root / name, target)
    except MedsegError as error:
        failed.append(f"{name}: copied without its voxels ({error})")
    return ()


def _target_names(spec: DatasetSpec, root: Path) -> dict[str, str]:
    """Return file -> its place in the copy: the same, or below `files` where it lies outside."""
    base = os.path.normpath(root)
    names: dict[str, str] = {}
    for case, entry in spec.cases.items():
        for name in entry.files:
            path = os.path.normpath(root / name)
            inside = path.startswith(base + os.sep)
            relative = os.path.relpath(path, base) if inside else f"files/{case}/{Path(name).name}"
            number = 1
            while relative in names.values() and names.get(name) != relative and not inside:
                number += 1
                relative = f"files/{case}/{number}/{Path(name).name}"
            names.setdefault(name, Path(relative).as_posix())
    return names


def _copy_image(source: Path, target: Path) -> None:
    """Copy an image with the files that belong to it, to the same places beside it.

    Where the voxels do not lie below the folder of their header, the image is written anew.

    Raises:
        DatasetError: If it cannot be written anew.
    """
    parts = companions(source)
    places = {path: _beside(path, source.parent, target.parent) for path in parts}
    _copy(source, target)
    is_whole = all(
        place is not None and not (place.exists() and not cmp(path, place, shallow=False))
        for path, place in places.items()
    )
    for path, place in places.items():
        if is_whole and place is not None:
            _copy(path, place)
    here = target.parent
    if not is_whole or any(_beside(path, here, here) is None for path in companions(target)):
        _write_anew(source, target)


def _beside(path: Path, old: Path, new: Path) -> Path | None:
    """Return the place in one folder of a file below another; None where it is not below it."""
    relative = os.path.relpath(path, old)
    return None if relative.split(os.sep)[0] == os.pardir else new / relative


def _write_anew(source: Path, target: Path) -> None:
    try:
        stored = read_stored(source)
    except MedsegError:
        return  # as it was: the report says what is wrong
    if stored.array.ndim != 3:
        raise DatasetError(
            f"they lie in another folder, shape {stored.array.shape}; expected one value per voxel "
            "to write them beside their header. Copy them by hand"
        )
    write_image(target, _intensities(stored), stored.header)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    os.replace(part, target)


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
    """Return the manifest of the dataset with its files in their new places."""
    cases = {
        case: entry.model_copy(
            update={
                "channels": tuple(names[name] for name in entry.channels),
                "segmentation": names[entry.segmentation] if entry.segmentation else None,
            }
        )
        for case, entry in spec.cases.items()
    }
    labels = LabelNames(
        labels=spec.labels,
        regions_class_order=spec.regions_class_order,
        ignore_label=spec.ignore_label,
    )
    return manifest_values(spec.channels, labels, cases)
