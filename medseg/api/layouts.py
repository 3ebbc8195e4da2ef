"""Look at a folder that nobody has described, and write its manifest."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.data.dataset import read_dataset
from medseg.data.layouts.contents import with_images, with_labels, with_patients
from medseg.data.layouts.described import LabelNames
from medseg.data.layouts.found import Found
from medseg.data.layouts.manifest import manifest_values, read_listed
from medseg.data.layouts.names import MANIFEST, MANIFESTS, TABLE_ENDINGS, describing_file
from medseg.data.layouts.pairing import pair_files
from medseg.data.workspace import DEFAULT_WORKSPACE, Workspace
from medseg.errors import DatasetError, MedsegError
from medseg.schema.base import FORMAT_VERSION, write_json

logger = logging.getLogger(__name__)


def init_dataset(
    folder: str | Path,
    *,
    images: str | None = None,
    segmentations: str | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    progress: bool = False,
) -> Path:
    """Look at a folder and write the manifest of what was found.

    Arguments and errors are those of `look_at` and `write_found`.

    Returns:
        The manifest, or the description that was there already.
    """
    found = look_at(
        folder,
        images=images,
        segmentations=segmentations,
        workspace=workspace,
        progress=progress,
    )
    return write_found(found, workspace=workspace)


def look_at(
    folder: str | Path,
    *,
    images: str | None = None,
    segmentations: str | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    progress: bool = False,
) -> Found:
    """Find the cases, channels and labels of a folder; nothing is written.

    Args:
        folder: Folder of images and segmentations, or a table of them that lacks the labels.
        images: Pattern of the images, such as "sub-*/anat/*_T1w.nii.gz"; None goes by names.
        segmentations: Pattern of the segmentations, likewise.
        workspace: Folder that may hold a manifest of the folder already.
        progress: Show a progress bar on standard error.

    Raises:
        DatasetError: If nothing can be paired, or a manifest is there already.
        ConfigError: If a pattern is not usable.
    """
    path = Path(folder)
    if not path.exists():
        raise DatasetError(f"{path}: no such folder. Give the folder of the data.")
    if path.is_file():
        return with_labels(_listed(path), path.parent, progress)
    _refuse_manifest(path, Workspace(Path(workspace)))
    notes: tuple[str, ...] = ()
    if images is None and segmentations is None and describing_file(path) is not None:
        try:
            return _described(path)
        except MedsegError as error:
            reason = str(error).splitlines()[0].removeprefix(f"{path}: ")
            notes = (f"dataset.json cannot be used as it is ({reason})",)
    pairing = pair_files(path, images=images, segmentations=segmentations)
    found = with_images(path, pairing, progress)
    return with_labels(replace(found, notes=(*notes, *found.notes)), path, progress)


def write_found(found: Found, *, workspace: str | Path = DEFAULT_WORKSPACE) -> Path:
    """Write what was found: beside the data, or into the workspace where that is not possible.

    Returns:
        The manifest, or the description that needed nothing added.

    Raises:
        DatasetError: If a manifest is there already.
    """
    if found.is_described:
        return found.target
    if found.table is not None:
        settings = manifest_values(found.channels, found.names, found.cases)
        del settings["cases"]
        return _write_new(found.target, settings)
    if found.folder.stat().st_mode & 0o222:
        try:
            return _write_new(
                found.target, manifest_values(found.channels, found.names, found.cases)
            )
        except OSError as error:
            logger.info("%s cannot be written: %s", found.target, error.strerror)
    root = found.folder.resolve()
    folder, _ = Workspace(Path(workspace)).find(root)
    target = folder.manifest_path
    return _write_new(
        target,
        {
            "format_version": FORMAT_VERSION,
            "folder": str(root),
            **manifest_values(found.channels, found.names, found.cases),
        },
    )


def _write_new(path: Path, values: Mapping[str, Any]) -> Path:
    if path.exists():
        raise _present(path)
    write_json(path, dict(values))
    return path


def _present(path: Path) -> DatasetError:
    return DatasetError(
        f"{path}: there already, written earlier or by hand; it is not overwritten. Edit it, or "
        "delete or rename it to have a new one written."
    )


def _refuse_manifest(folder: Path, workspace: Workspace) -> None:
    """Refuse a folder with a manifest before time is spent on looking at it."""
    beside = [folder / name for name in MANIFESTS]
    _, described_by = workspace.find(folder.resolve())
    for path in (*beside, described_by):
        if path is not None and path.is_file():
            raise _present(path)


def _listed(path: Path) -> Found:
    """Return the cases of a table that does not say what the labels are."""
    if path.suffix.lower() not in TABLE_ENDINGS:
        raise DatasetError(f"{path}: expected a folder, or a table that ends in .csv or .tsv.")
    target = path.with_suffix(".json")
    if target.exists():
        raise _present(target)
    described = read_listed(path)
    return Found(
        folder=described.root,
        cases=described.cases,
        channels=described.channels,
        names=LabelNames(labels={}),
        label_counts={},
        notes=tuple(found.message for found in described.problems),
        target=target,
        table=path,
    )


def _described(folder: Path) -> Found:
    """Return a dataset that is described already, with patients where its ids name them."""
    spec = read_dataset(folder)
    cases, note = with_patients(spec.cases)
    is_described = not note
    notes = (note, f"{MANIFEST} takes the place of {Path(spec.description).name}")
    return Found(
        folder=Path(spec.source),
        cases=cases,
        channels=spec.channels,
        names=LabelNames(
            labels=spec.labels,
            regions_class_order=spec.regions_class_order,
            ignore_label=spec.ignore_label,
        ),
        label_counts={},
        notes=() if is_described else notes,
        target=Path(spec.description) if is_described else folder / MANIFEST,
        is_described=is_described,
    )


def next_step(found: Found, path: Path) -> str:
    """Return what to tell a person after `write_found`."""
    if found.is_described:
        return f"{path} describes this folder already; nothing was written."
    is_beside = path.parent.resolve() == found.folder.resolve()
    why = "" if is_beside else "\n(not beside the data: that folder is read-only)"
    data = found.folder if found.table is None else found.table
    command = f"medseg plan-and-preprocess {shlex.quote(str(data))}"
    return f"Wrote {path}{why}\nLook through it, then: {command}"
