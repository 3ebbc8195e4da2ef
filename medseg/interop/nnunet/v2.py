"""Read a trained model of nnU-Net v2: a folder with plans, a dataset.json and folds.

Source:
    Files and behaviour of nnU-Net 2.8.1, and of the releases before it since 2.0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import BundleError
from medseg.interop.nnunet.foreign import ForeignModel, Weights
from medseg.interop.nnunet.found import Found, find_models
from medseg.interop.nnunet.v2_dataset import DatasetFile, dataset_spec
from medseg.interop.nnunet.v2_files import PlansFile
from medseg.interop.nnunet.v2_plans import (
    Entry,
    architecture_of,
    intensity_of,
    orientation_of,
    plans_of,
    read_entry,
    semantics_of,
)
from medseg.interop.nnunet.v2_postprocessing import read_postprocessing
from medseg.interop.nnunet.v2_values import as_whole, checked, read_foreign_json, shown
from medseg.interop.nnunet.v2_weights import (
    Checkpoint,
    Network,
    check_weights,
    read_checkpoint,
    read_weights,
)
from medseg.labels import LabelScheme
from medseg.schema.bundle import Orientation, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Plans

_TRAINER = "nnUNetTrainer"
_PLANS, _DATASET = "plans.json", "dataset.json"
Files = Mapping[str, Mapping[str, Path]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """What the files of a model hold, and what to call it."""

    folder: Path
    plans: tuple[Any, str]
    """Content, and what messages call the file."""
    dataset: tuple[Any, str]
    """Likewise."""
    configuration: str
    checkpoint: Checkpoint
    notes: list[str]
    """Where what a user should know is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Description:
    """What plans, dataset and a checkpoint say together, in medseg's terms."""

    spec: DatasetSpec
    plans: Plans
    semantics: Semantics
    orientation: Orientation
    network: Network


def read_v2(
    folder: Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str | int] | None = None,
    checkpoints: Sequence[str] = ("final", "best"),
) -> ForeignModel:
    """Return a trained model in medseg's terms, all checked but the values of its weights.

    Args:
        folder: Folder of the model, or of one of its folds.
        configuration: The one that is expected; None: the one there is.
        folds: As a user writes them; None: every numbered one, or "all" where it is the only one.
        checkpoints: Those that are wanted, where they are present.

    Raises:
        BundleError: If files are missing or damaged, make no sense, or need what medseg does not
            have; with every problem.
    """
    found = _found(Path(folder))
    chosen = found.select_folds(folds)
    notes: list[str] = []
    files = _files(found, chosen, checkpoints, notes)
    checkpoint = read_checkpoint(next(iter(files[chosen[0]].values())))
    raw_plans = _json(found.folder / _PLANS, checkpoint.plans, notes)
    raw_dataset = _json(found.folder / _DATASET, checkpoint.dataset, notes)
    name = _configuration(found, checkpoint, configuration, raw_plans)
    described = _describe(
        _Sources(
            folder=found.folder,
            plans=raw_plans,
            dataset=raw_dataset,
            configuration=name,
            checkpoint=checkpoint,
            notes=notes,
        )
    )
    check_weights(checkpoint.path, described.network)
    if checkpoint.trainer not in ("", _TRAINER):
        notes.append(
            f"It was trained by {checkpoint.trainer}; its weights fit the network that the plans "
            "describe by every name and shape."
        )
    postprocessing, remarks = read_postprocessing(
        found.folder, found.others, chosen, LabelScheme.from_spec(described.spec).values
    )
    previous = _previous(found, described.plans, checkpoint, chosen, notes)
    return ForeignModel(
        folder=found.folder,
        spec=described.spec,
        plans=described.plans,
        configuration=name,
        semantics=described.semantics,
        orientation=described.orientation,
        weights=_weights(files, described.network),
        trainer=checkpoint.trainer,
        postprocessing=postprocessing,
        previous=previous,
        notes=(*notes, *remarks),
    )


def _found(folder: Path) -> Found:
    models = [model for model in find_models(folder) if model.version == 2]
    if len(models) != 1:
        raise BundleError(
            f"{folder}: holds {len(models) or 'no'} models of nnU-Net version 2; expected the "
            "folder of one, with fold_0/checkpoint_final.pth or the like in it."
        )
    return models[0]


def _files(
    found: Found, folds: Sequence[str], checkpoints: Sequence[str], notes: list[str]
) -> dict[str, dict[str, Path]]:
    """Return the file of each fold and checkpoint.

    Raises:
        BundleError: If a fold has none of the checkpoints.
    """
    files = {
        fold: {
            checkpoint: found.folder / found.weights[fold][checkpoint]
            for checkpoint in ("final", "best")
            if checkpoint in checkpoints and checkpoint in found.weights[fold]
        }
        for fold in folds
    }
    if lacking := [fold for fold, there in files.items() if not there]:
        raise BundleError(
            f"{found.folder}: {', '.join(lacking)} have no checkpoint "
            f"{' or '.join(map(repr, checkpoints))}; ask for other folds or checkpoints."
        )
    unfinished = [fold for fold in folds if "final" not in files[fold]]
    if unfinished and "final" in checkpoints:
        notes.append(f"The training of {', '.join(unfinished)} did not end: only 'best' is there.")
    return files


def _json(path: Path, copy: Any, notes: list[str]) -> tuple[Any, str]:
    """Return the content of a file and what to call it; where it is missing, the checkpoint's copy.

    Raises:
        BundleError: If neither is there, or the file is damaged.
    """
    if path.exists():
        return read_foreign_json(path), path.name
    if not isinstance(copy, dict):
        raise BundleError(
            f"{path}: no such file, and the checkpoint holds no copy of it. Copy it from where "
            "the model was trained."
        )
    notes.append(f"{path.name} is missing; the copy in the checkpoint is used.")
    return copy, f"{path.name} (the checkpoint's copy)"


def _configuration(
    found: Found, checkpoint: Checkpoint, wanted: str | None, plans: tuple[Any, str]
) -> str:
    """Return the name of the configuration that was trained.

    Raises:
        BundleError: If it is not known, or not the one that is wanted.
    """
    entries = plans[0].get("configurations") if isinstance(plans[0], dict) else None
    only = list(entries) if isinstance(entries, dict) and len(entries) == 1 else [None]
    trained = checkpoint.configuration or found.configuration or wanted or only[0]
    if not isinstance(trained, str):
        raise BundleError(
            f"{found.folder}: neither the checkpoint nor the folder's name says which "
            "configuration was trained. Name it."
        )
    if wanted not in (None, trained):
        raise BundleError(
            f"{found.folder}: holds the configuration {trained!r}, not {wanted!r}. Give the "
            "folder of the other one."
        )
    return trained


def _describe(sources: _Sources) -> _Description:
    """Bring together what the files say.

    Raises:
        BundleError: With every problem of all of them.
    """
    problems: list[str] = []
    (plans, where), name = sources.plans, sources.configuration
    file = checked(PlansFile, plans, where, problems)
    entry = read_entry(plans, name, where, problems)
    dataset = (file.dataset_name if file is not None else "") or sources.folder.parent.name
    parts = dataset_spec(*sources.dataset, dataset, problems, sources.notes)
    if file is not None and entry is not None and parts is not None:
        described = _joined(sources, file, entry, parts, problems)
        if not problems:
            return described
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"{count} in the model {sources.folder}:", *(f"  {line}" for line in problems)]
    hint = "Copy the files again where they are damaged; what is not known cannot be taken over."
    raise BundleError("\n".join([*lines, hint]))


def _joined(
    sources: _Sources,
    file: PlansFile,
    entry: Entry,
    dataset: tuple[DatasetSpec, DatasetFile],
    problems: list[str],
) -> _Description:
    """Return what files say that are sound alone, and note where they contradict each other."""
    (plans, where), (spec, dataset_file) = sources.plans, dataset
    checkpoint, arguments = sources.checkpoint, entry.network.arch_kwargs
    schemes, channels = len(entry.normalization_schemes), len(spec.channels)
    if schemes != channels:
        problems.append(
            f"{where}.configurations.{sources.configuration}.normalization_schemes: it has "
            f"{schemes} entries; expected {channels}, one for each channel of {sources.dataset[1]}"
        )
    architecture = architecture_of(entry.network, is_batch_norm=checkpoint.has_running_statistics)
    labels = LabelScheme.from_spec(spec)
    described = plans_of(
        file,
        entry,
        sources.configuration,
        dataset=spec.name,
        architecture=architecture,
        intensity=intensity_of(plans, entry, where, problems),
    )
    num_previous = labels.num_previous(described.configurations[sources.configuration])
    return _Description(
        spec=spec,
        plans=described,
        semantics=semantics_of(
            entry,
            _mirror_axes(checkpoint, len(entry.patch_size), problems),
            has_regions=labels.has_regions,
        ),
        orientation=orientation_of(
            file, dataset_file.overwrite_image_reader_writer, where, problems, sources.notes
        ),
        network=Network(
            architecture=architecture,
            num_inputs=channels + num_previous,
            num_logits=labels.num_logits,
            has_biases=arguments.conv_bias,
            has_scales=arguments.has_scales or checkpoint.has_running_statistics,
        ),
    )


def _mirror_axes(checkpoint: Checkpoint, num_axes: int, problems: list[str]) -> tuple[int, ...]:
    """Return the axes that are mirrored; none where the checkpoint does not name any."""
    given = checkpoint.mirror_axes
    if given is None:
        return ()
    entries = given if isinstance(given, (list, tuple)) else ("?",)
    axes = tuple(as_whole(entry) for entry in entries)
    is_sound = all(type(axis) is int and 0 <= axis < num_axes for axis in axes)
    if not is_sound or len(set(axes)) != len(axes):
        problems.append(
            f"{checkpoint.path.parent.name}/{checkpoint.path.name}."
            f"inference_allowed_mirroring_axes: got {shown(given)}; expected axes from 0 to "
            f"{num_axes - 1}"
        )
        return ()
    return axes


def _weights(files: Files, network: Network) -> dict[str, dict[str, Weights]]:
    return {
        fold: {
            checkpoint: functools.partial(read_weights, path, network)
            for checkpoint, path in entries.items()
        }
        for fold, entries in files.items()
    }


def _previous(
    found: Found,
    plans: Plans,
    checkpoint: Checkpoint,
    folds: Sequence[str],
    notes: list[str],
) -> Path | None:
    """Return the folder of the stage before, of the same trainer or else of the plain one."""
    (configuration,) = plans.configurations.values()
    stage = configuration.previous_stage
    if stage is None:
        return None
    tried = []
    trainer = checkpoint.trainer or found.trainer or _TRAINER
    for name in dict.fromkeys((trainer, found.trainer or trainer, _TRAINER)):
        folder = found.folder.parent / f"{name}__{plans.name}__{stage}"
        is_beside = folder.parent == found.folder.parent and "\0" not in folder.name
        models = find_models(folder) if is_beside and folder.is_dir() else []
        lacking = [fold for fold in folds if fold not in (models[0].folds if models else ())]
        if models and not lacking:
            return folder
        why = f"no weights of {', '.join(lacking)}" if models else "not there"
        tried.append(f"{folder.name} ({why})")
    notes.append(
        f"It is the second stage of a cascade; the first, {stage}, was not found beside it: "
        f"{'; '.join(tried)}."
    )
    return None
