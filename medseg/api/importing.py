"""Take over models of nnU-Net and TotalSegmentator: into a bundle, or on the fly into a cache."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from medseg.bundles.bundle import MANIFEST, Bundle, write_bundle
from medseg.bundles.files import file_checksum
from medseg.bundles.members import Composite, write_chain
from medseg.errors import BundleError, ConfigError, near_names
from medseg.interop.nnunet.foreign import ForeignModel, Weights
from medseg.interop.nnunet.found import (
    Found,
    choose_model,
    find_models,
    models_in,
    needed_files,
)
from medseg.interop.nnunet.v1 import read_v1
from medseg.interop.nnunet.v2 import read_v2
from medseg.interop.totalsegmentator import Refused, Task, choose_task, read_tasks
from medseg.io.archive import Archive
from medseg.schema.base import read_json
from medseg.schema.bundle import Semantics

logger = logging.getLogger(__name__)

LabelRule = Literal["argmax", "threshold"]
IMPORT_VERSION = 1
"""Raise when an import gives another bundle, so that a cache's old ones are not taken for it."""
_DATASET = "dataset.json"


def list_nnunet(path: str | Path) -> list[Found]:
    """Return the models of nnU-Net in a folder or zip; nothing in them is opened.

    Args:
        path: Folder of a model, tree of results, or zip of either.

    Raises:
        BundleError: If there is no such file, or a zip is damaged or unsafe.
    """
    path = Path(path)
    if _is_archive(path):
        with Archive(path) as archive:
            return models_in(archive.names())
    return find_models(path)


def import_nnunet(  # noqa: PLR0913 - one option of the command each
    path: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    configuration: str | None = None,
    trainer: str | None = None,
    plans: str | None = None,
    folds: Sequence[str | int] | None = None,
    dataset_json: str | Path | None = None,
    label_resize: LabelRule = "argmax",
) -> Bundle:
    """Write a bundle of a model of nnU-Net, version 1 or 2; nothing in its files is run.

    Args:
        path: Folder of the model, tree of results, or zip of either.
        output: Folder for the bundle; an earlier bundle there is replaced.
        task: Name or number of the task or dataset, where there are several.
        configuration: Such as "3d_fullres", likewise.
        trainer: Class that trained it, likewise.
        plans: Name of the plans, likewise.
        folds: Folds to take (0, "fold_0", "all" ...); None takes every numbered one.
        dataset_json: Names labels and channels of a version 1 model, which only counts them.
        label_resize: How the first stage's label map is resampled in a cascade, and the mask of the
            image in version 1: as batchgenerators does since release 0.25.4, or "threshold" as it
            did before.

    Raises:
        ConfigError: If `label_resize` is another word.
        BundleError: If there is no such model or several, a file is damaged, unsafe or asks for
            code, or the model needs what medseg does not have.
    """
    _check_rule(label_resize)
    wanted = {"dataset": task, "configuration": configuration, "trainer": trainer, "plans": plans}
    with _unpacked(Path(path), wanted, folds, Path(output)) as found:
        model = _read(found, folds, None if dataset_json is None else Path(dataset_json))
        return _write(model, Path(output), folds, label_resize)


def list_totalsegmentator(folder: str | Path) -> tuple[Task | Refused, ...]:
    """Return the tasks of TotalSegmentator whose models lie in a folder.

    Args:
        folder: Where that tool keeps its weights, or one unpacked archive of them.

    Raises:
        BundleError: If there is no model.
    """
    return read_tasks(Path(folder))


def import_totalsegmentator(
    folder: str | Path, output: str | Path, *, task: str | None = None
) -> Composite:
    """Write a chain of a task's models, with the steps around them; nothing in the files is run.

    Args:
        folder: Where that tool keeps its weights, or one unpacked archive of them.
        output: Folder for the bundle; an earlier bundle there is replaced.
        task: Such as "total" or "total_fast"; None: the only one there is.

    Raises:
        BundleError: If there is no such task or several, a part is missing or damaged, or the task
            needs what medseg does not have.
    """
    folder, output = Path(folder), Path(output)
    chosen = choose_task(read_tasks(folder), task, folder)
    for note in chosen.notes:
        logger.info("%s: %s", chosen.name, note)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".import-") as scratch:
        members = {}
        for name, part in chosen.parts.items():
            model = replace(read_v2(part.folder, folds=part.folds), postprocessing=None)
            members[name] = _write(model, Path(scratch) / name, part.folds, "argmax").folder
        return write_chain(
            output,
            spec=chosen.spec,
            chain=chosen.chain,
            members=members,
            postprocessing=chosen.postprocessing,
        )


def imported(path: Path, cache: Path) -> Path:
    """Return the bundle of a model of nnU-Net, imported now or earlier.

    Args:
        path: Folder or zip that holds one model.
        cache: Folder of such bundles, each under the checksum of the files it came from.

    Raises:
        BundleError: As `import_nnunet`.
    """
    if _is_archive(path):
        folder = cache / _key([(path.name, path)])
        return cached(folder, lambda output: import_nnunet(path, output))
    found = choose_model(find_models(path), str(path))
    model = _read(found, None, None)
    chosen = _every_fold(found, model)
    folder = cache / _key(_sources(found, model))
    if (folder / MANIFEST).is_file():
        return folder
    logger.info("importing %s into %s", path, folder)
    if set(chosen) != set(model.weights):
        model = _read(found, chosen, None)
    return cached(folder, lambda output: _write(model, output, chosen, "argmax"))


def _every_fold(found: Found, model: ForeignModel) -> tuple[str, ...]:
    """Return all folds there are, so that each can be asked for later.

    A cascade keeps those it was read with: its first stage may not have others.
    """
    (configuration,) = model.plans.configurations.values()
    return found.folds if configuration.previous_stage is None else tuple(model.weights)


def cached(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder of a cache, made if it is not there; of several processes one makes it.

    Args:
        folder: Whatever is there already stays, as others may read it.
        make: Writes the bundle to a place it is given.
    """
    if (folder / MANIFEST).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".import-") as scratch:
        made = Path(scratch) / "bundle"
        make(made)
        if folder.exists() and not (folder / MANIFEST).is_file():
            folder.rename(Path(scratch) / "remains")
        try:
            made.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
    return folder


def is_nnunet(path: Path) -> bool:
    """Return whether a folder or zip holds a model of nnU-Net, by the names of its files."""
    return bool(list_nnunet(path)) if path.is_dir() or _is_archive(path) else False


def _check_rule(rule: str) -> None:
    known = list(get_args(LabelRule))
    if rule not in known:
        raise ConfigError(
            f"label_resize is {rule!r}; expected one of: {', '.join(known)}."
            f"{near_names(rule, known)}"
        )


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".zip"


@contextmanager
def _unpacked(
    path: Path, wanted: dict[str, str | None], folds: Sequence[str | int] | None, output: Path
) -> Iterator[Found]:
    """Yield the one model that is meant; of a zip only what is needed is unpacked, for a while."""
    if not _is_archive(path):
        yield choose_model(find_models(path), str(path), **wanted)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        Archive(path) as archive,
        tempfile.TemporaryDirectory(dir=output.parent, prefix=".import-") as scratch,
    ):
        there = archive.names()
        models = models_in(there)
        found = choose_model(models, str(path), **wanted)
        beside = [str(parent / _DATASET) for parent in _in_zip(found).parents]
        names = [name for name in beside if name in there]
        names += [str(_in_zip(found, name)) for name in found.others]
        archive.extract(names, Path(scratch))
        stages = _stages_before(Path(scratch), found)
        more = [
            str(_in_zip(model, name))
            for model in models
            if model is found or _is_first(model, found, stages)
            for name in needed_files(model, folds if model is found else None)
        ]
        archive.extract([name for name in more if name not in names], Path(scratch))
        yield replace(found, folder=Path(scratch) / found.folder)


def _in_zip(found: Found, name: str = "") -> PurePosixPath:
    """Return the name of a model's folder or file in the zip it was found in."""
    return PurePosixPath(found.folder.as_posix(), name)


def _stages_before(root: Path, found: Found) -> set[str]:
    """Return the configurations that may be the stage before a model, by its unpacked plans."""
    if found.version == 1:
        return {"3d_lowres"}
    plans = root / found.folder / "plans.json"
    try:
        content = read_json(plans) if plans.is_file() else {}
    except ConfigError:  # what is wrong with it is said when it is read
        return set()
    entries = content.get("configurations") if isinstance(content, dict) else None
    values = entries.values() if isinstance(entries, dict) else ()
    stages = {entry.get("previous_stage") for entry in values if isinstance(entry, dict)}
    return {stage for stage in stages if isinstance(stage, str)}


def _is_first(model: Found, found: Found, stages: set[str]) -> bool:
    """Return whether a model may be the first stage of another in a cascade."""
    is_alike = (model.version, model.dataset) == (found.version, found.dataset)
    return is_alike and model is not found and model.configuration in stages


def _read(
    found: Found, folds: Sequence[str | int] | None, dataset_json: Path | None
) -> ForeignModel:
    if found.version == 1:
        return read_v1(found.folder, folds=folds, dataset_json=dataset_json)
    if dataset_json is not None:
        raise BundleError(
            f"{found.folder}: brings its own dataset.json, being of version 2; leave out "
            "dataset_json."
        )
    return read_v2(found.folder, folds=folds)


def _write(
    model: ForeignModel,
    output: Path,
    folds: Sequence[str | int] | None,
    label_resize: LabelRule,
) -> Bundle:
    """Write a model and, in a cascade, the stage before it."""
    for note in (*model.notes, *_own_notes(model)):
        logger.info("%s: %s", model.folder.name, note)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".import-") as scratch:
        previous = None
        if model.previous is not None:
            chosen = folds if folds is not None else tuple(model.weights)
            (found,) = find_models(model.previous)
            first = _read(found, chosen, None)
            if found.version == 1:  # it does not say what its labels are called
                first = replace(first, spec=model.spec)
            previous = _write(first, Path(scratch) / "previous", chosen, label_resize).folder
        return write_bundle(
            output,
            spec=model.spec,
            plans=model.plans,
            configuration=model.configuration,
            weights=_with_final(model),
            semantics=Semantics.model_validate(
                {
                    **model.semantics.model_dump(),
                    "label_resize": label_resize,
                    "low_precision": "checked",
                }
            ),
            orientation=model.orientation,
            recipe=model.trainer,
            postprocessing=model.postprocessing,
            previous=previous,
        )


def _own_notes(model: ForeignModel) -> list[str]:
    how = model.semantics.resample_result
    if how.method != "spline" or how.order == 1:
        return []
    return [
        f"It resamples its results with splines of order {how.order}; so does 'predict --exact', "
        "while the default is linear."
    ]


def _with_final(model: ForeignModel) -> dict[str, dict[str, Weights]]:
    """Return the weights of a bundle; the best ones stand in where a training did not end."""
    return {
        fold: dict(entries) if "final" in entries else {"final": entries["best"]}
        for fold, entries in model.weights.items()
    }


def _sources(found: Found, model: ForeignModel) -> list[tuple[str, Path]]:
    """Return name and place of all files that a bundle of a model would be made of."""
    before = find_models(model.previous) if model.previous is not None else []
    files = [
        (f"{number}/{name}", each.folder / name)
        for number, each in enumerate([found, *before])
        for name in needed_files(each, each.folds)
    ]
    if found.version == 1 and (file := found.folder.parent / _DATASET).is_file():
        files.append((f"above/{_DATASET}", file))
    return files


def _key(files: Sequence[tuple[str, Path]]) -> str:
    """Return a checksum over the names and the content of files, and the way of importing them."""
    total = hashlib.sha256(f"import {IMPORT_VERSION}\n".encode())
    for name, file in files:
        total.update(f"{name}\0{file_checksum(file)}\n".encode())
    return total.hexdigest()
