"""Read a trained model of nnU-Net v1: what its files say, in medseg's own terms.

```text
CONFIGURATION/TaskXXX_Name/TRAINER__PLANS/
  fold_0 ... | all/model_final_checkpoint.model        the weights, as torch.save writes them
                   model_final_checkpoint.model.pkl    trainer, stage, plans; the first fold leads
  postprocessing.json                                  optional
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BundleError
from medseg.interop.nnunet.foreign import ForeignModel, Weights
from medseg.interop.nnunet.found import Found, find_models
from medseg.interop.nnunet.pickles import read_pickle
from medseg.interop.nnunet.torch_file import TorchFile
from medseg.interop.nnunet.v1_labels import described_by, spec_of
from medseg.interop.nnunet.v1_plans import StagePlans, stage_plans
from medseg.interop.nnunet.v1_postprocessing import FILE as POSTPROCESSING
from medseg.interop.nnunet.v1_postprocessing import read_postprocessing
from medseg.interop.nnunet.v1_trainers import (
    REGIONS,
    Trainer,
    before_cascade,
    mirror_axes_of,
    trainer_of,
)
from medseg.interop.nnunet.v1_values import problem_lines
from medseg.interop.nnunet.v1_weights import (
    V1Network,
    check_network,
    network_of,
    read_network,
    renamed,
)
from medseg.interop.nnunet.v2_values import shown
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.plans import Configuration, Plans

if TYPE_CHECKING:
    import torch

_FLAT, _LOW, _FULL, _CASCADE = "2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"
_LONGEST_NAME = 200
_PREVIOUS_TRAINER = 8
"""Where a cascade's arguments name the trainer of the stage before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What was read of a model, before it is put together."""

    found: Found
    folds: tuple[str, ...]
    trainer: Trainer
    arguments: tuple[Any, ...]
    plans: StagePlans
    network: V1Network
    is_cascade: bool


def read_v1(
    folder: Path,
    *,
    folds: Sequence[str | int] | None = None,
    checkpoints: Sequence[str] = ("final", "best"),
    dataset_json: Path | None = None,
) -> ForeignModel:
    """Read a trained model; of its weights names and shapes alone, until they are asked for.

    Args:
        folder: Folder of the model, or of one of its folds.
        folds: "fold_0" or 0 ... or "all"; None: every numbered fold, or "all" where it is alone.
        checkpoints: Those wanted, of those that all of the folds have.
        dataset_json: Names its labels and channels, which the model itself only counts; None: the
            one beside the model, if there is one.

    Raises:
        BundleError: With every problem of the plans, or every tensor that does not fit; or if the
            model is missing, or cannot be expressed.

    Source:
        Files and behaviour of nnU-Net 1.7.1 and, where plans lack what came later, what it takes
        for them.
    """
    found = _model_in(Path(folder))
    folder = found.folder
    chosen = found.select_folds(folds)
    files = _files(found, chosen, checkpoints)
    described = _described(folder / f"{next(iter(files[chosen[0]].values()))}.pkl")
    parts = _parts(found, chosen, described, files)
    weights: dict[str, dict[str, Weights]] = {
        fold: {
            checkpoint: partial(_read_weights, folder / file, parts.network)
            for checkpoint, file in of_fold.items()
        }
        for fold, of_fold in files.items()
    }
    return _model(parts, weights, dataset_json)


def _model_in(folder: Path) -> Found:
    models = [model for model in find_models(folder) if model.version == 1]
    if len(models) != 1:
        raise BundleError(
            f"{folder}: holds {len(models) or 'no'} models of nnU-Net version 1; expected the "
            "folder of one, with fold_0/model_final_checkpoint.model or the like in it."
        )
    return models[0]


def _files(
    found: Found, folds: Sequence[str], checkpoints: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Return fold -> checkpoint -> file, of the checkpoints that all folds have."""
    shared = [
        name
        for name in found.checkpoints
        if name in checkpoints and all(name in found.weights[fold] for fold in folds)
    ]
    if not shared:
        each = "; ".join(f"{fold}: {', '.join(found.weights[fold])}" for fold in folds)
        raise BundleError(
            f"{found.folder}: no checkpoint is in all of the folds ({each}); expected one of: "
            f"{', '.join(checkpoints)}. Choose folds that have it."
        )
    return {fold: {name: found.weights[fold][name] for name in shared} for fold in folds}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """The content of a `.model.pkl`."""

    trainer: Trainer
    arguments: tuple[Any, ...]
    plans: StagePlans


def _described(path: Path) -> _Described:
    content = read_pickle(path, where=str(path))
    problems = []
    values = content if isinstance(content, Mapping) else {}
    name, arguments = values.get("name"), values.get("init")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > _LONGEST_NAME:
        problems.append(f"name: got {shown(name)}; expected the name of the trainer's class")
    if not isinstance(arguments, (tuple, list)):
        problems.append(f"init: got {shown(arguments)}; expected the trainer's arguments")
    if problems or not isinstance(name, str) or not isinstance(arguments, (tuple, list)):
        raise BundleError(problem_lines(str(path), problems))
    trainer = trainer_of(name)
    if trainer.refused:
        raise BundleError(
            f"{path}: the model was trained by {name}, whose network has {trainer.refused}; "
            "medseg's networks have instance norm, batch norm or none. It cannot be imported."
        )
    place = trainer.stage_position
    stage = arguments[place] if place < len(arguments) else None
    plans = stage_plans(values.get("plans"), stage, f"the plans in {path}")
    return _Described(trainer=trainer, arguments=tuple(arguments), plans=plans)


def _parts(
    found: Found,
    folds: tuple[str, ...],
    described: _Described,
    files: Mapping[str, Mapping[str, str]],
) -> _Parts:
    """Check all weights against each other and against the plans."""
    network: V1Network | None = None
    for of_fold in files.values():
        for file in of_fold.values():
            path = found.folder / file
            with TorchFile(path) as opened:
                stored = renamed(_state(opened.content, path), str(path))
                if network is None:
                    network = network_of(stored, described.trainer.options, str(path))
                else:
                    check_network(stored, network, str(path))
    if network is None:
        raise BundleError(f"{found.folder}: no weights.")
    num_classes, num_channels = len(described.plans.classes), len(described.plans.channels)
    is_cascade = network.num_inputs == num_channels + num_classes
    problems = _disagreements(described.trainer, described.plans, network, is_cascade)
    if problems:
        origin = f"{found.folder}, whose weights and plans disagree"
        raise BundleError(problem_lines(origin, problems))
    return _Parts(
        found=found,
        folds=folds,
        trainer=described.trainer,
        arguments=described.arguments,
        plans=described.plans,
        network=network,
        is_cascade=is_cascade,
    )


def _state(content: Any, path: Path) -> Any:
    if isinstance(content, Mapping) and "state_dict" in content:
        return content["state_dict"]
    raise BundleError(f"{path}: holds no state_dict; expected a checkpoint of nnU-Net v1.")


def _read_weights(path: Path, network: V1Network) -> dict[str, torch.Tensor]:
    with TorchFile(path) as opened:
        return read_network(renamed(_state(opened.content, path), str(path)), network, str(path))


def _disagreements(
    trainer: Trainer, plans: StagePlans, network: V1Network, is_cascade: bool
) -> list[str]:
    """Return what the plans say that the weights do not."""
    problems = []
    architecture, num_axes = network.architecture, len(plans.patch_size)
    if architecture.num_axes != {num_axes}:
        return [f"the network has {architecture.num_axes} axes, the patch size {plans.patch_size}"]
    num_logits = len(REGIONS) if trainer.has_regions else len(plans.classes) + 1
    if network.num_logits != num_logits:
        what = "regions" if trainer.has_regions else "labels with the background"
        problems.append(
            f"the network has {network.num_logits} outputs; expected {num_logits}, one for each of "
            f"the {what}. The trainer, {trainer.name}, may have had regions of its own"
        )
    if network.num_inputs != len(plans.channels) and not is_cascade:
        problems.append(
            f"the network has {network.num_inputs} inputs; expected {len(plans.channels)}, one for "
            f"each channel, or {len(plans.channels) + len(plans.classes)} in a cascade"
        )
    if is_cascade and num_axes == 2:
        problems.append("the network is 2D and has inputs for a stage before, which v1 never has")
    strides = plans.strides
    if architecture.kind == "residual_unet" and strides and set(strides[0]) == {1}:
        strides = strides[1:]
    if strides != architecture.strides[1:]:
        problems.append(
            f"the plans have the strides {strides}; expected {architecture.strides[1:]}, those of "
            "the transposed convolutions"
        )
    whole = tuple(math.prod(steps) for steps in zip(*architecture.strides, strict=True))
    if any(size % step for size, step in zip(plans.patch_size, whole, strict=True)):
        problems.append(
            f"the patch size is {plans.patch_size}; expected multiples of {whole}, the product of "
            "the strides"
        )
    return problems


def _model(
    parts: _Parts, weights: Mapping[str, Mapping[str, Weights]], dataset_json: Path | None
) -> ForeignModel:
    """Put together what was read."""
    folder, trainer, plans = parts.found.folder, parts.trainer, parts.plans
    regions = trainer.has_regions
    described, aside = described_by(dataset_json, folder, plans, has_regions=regions)
    spec = spec_of(
        parts.found.dataset or folder.name, plans, has_regions=regions, described=described
    )
    configuration = _configuration_name(parts)
    previous, no_previous = _previous(parts) if parts.is_cascade else (None, None)
    postprocessing, left_out = None, None
    if (folder / POSTPROCESSING).is_file():
        num_labels = len(REGIONS) if regions else len(plans.classes)
        postprocessing, left_out = read_postprocessing(folder / POSTPROCESSING, num_labels)
    notes = [*_notes(parts), aside, no_previous, left_out]
    return ForeignModel(
        folder=folder,
        spec=spec,
        plans=_plans(parts, spec.name, configuration),
        configuration=configuration,
        semantics=_semantics(parts),
        orientation="stored_sitk",
        weights=weights,
        trainer=trainer.name,
        postprocessing=postprocessing,
        previous=previous,
        notes=tuple(note for note in notes if note),
    )


def _configuration_name(parts: _Parts) -> str:
    """Return the name of the configuration: by its folders where they make sense, or by itself."""
    if len(parts.plans.patch_size) == 2:
        return _FLAT
    if parts.is_cascade:
        return _CASCADE
    if parts.found.configuration in (_LOW, _FULL):
        return parts.found.configuration
    return _LOW if parts.plans.num_stages > 1 and parts.plans.stage == 0 else _FULL


def _plans(parts: _Parts, dataset: str, configuration: str) -> Plans:
    plans = parts.plans
    num_axes = len(plans.patch_size)
    batch_dice = parts.arguments[parts.trainer.stage_position - 1 :][:1]
    first, second, third = (
        size * spacing / original
        for size, spacing, original in zip(
            plans.median_shape, plans.spacing, plans.original_spacing, strict=True
        )
    )
    return Plans(
        name=parts.found.plans or "nnUNetPlans",
        dataset=dataset,
        network_axes=plans.network_axes,
        original_median_spacing=plans.original_spacing,
        original_median_shape=(first, second, third),
        intensity=plans.intensity,
        configurations={
            configuration: Configuration(
                patch_size=plans.patch_size,
                batch_size=plans.batch_size,
                spacing=plans.spacing[-num_axes:],
                median_shape=plans.median_shape[-num_axes:],
                normalization=plans.normalization,
                use_mask_for_norm=plans.use_mask,
                batch_dice=batch_dice == (True,),
                architecture=parts.network.architecture,
                previous_stage=_LOW if parts.is_cascade else None,
            )
        },
    )


def _semantics(parts: _Parts) -> Semantics:
    plans = parts.plans
    return Semantics(
        average="probabilities",
        activation="sigmoid" if parts.trainer.has_regions else "softmax",
        normalise_first=False,
        accumulator="float32",
        gaussian_peak=1.0,
        label_resize="argmax",
        mirror_axes=mirror_axes_of(parts.trainer, len(plans.patch_size)),
        least_std="added",
        keeps_slices=plans.keeps_slices,
        resample_image=plans.resample_image,
        resample_labels=Resampling() if parts.is_cascade else plans.resample_labels,
        resample_result=plans.resample_result,
        separate_by="image",
        previous="labels_uncropped" if parts.is_cascade else "logits",
    )


def _previous(parts: _Parts) -> tuple[Path | None, str | None]:
    """Return the folder of the stage before by the layout of the tree, or why there is none."""
    folder = parts.found.folder
    own, _, plans_name = folder.name.partition("__")
    place = folder.parent.parent.parent / _LOW / folder.parent.name
    told = parts.arguments[_PREVIOUS_TRAINER : _PREVIOUS_TRAINER + 1]
    known = told[0] if told and isinstance(told[0], str) and told[0].isidentifier() else None
    lacking = ""
    for trainer in before_cascade(own or parts.trainer.name, known):
        candidate = place / f"{trainer}__{plans_name}"
        models = find_models(candidate) if plans_name and candidate.is_dir() else []
        fitting = [model for model in models if model.version == 1 and model.folder == candidate]
        if fitting and set(parts.folds) <= set(fitting[0].folds):
            return candidate, None
        if fitting:
            lacking = f" ({trainer} is there, but not with the folds {', '.join(parts.folds)})"
    return None, (
        f"The stage before it, {_LOW} of the same task, was not found{lacking}: each case needs "
        "the segmentation of that stage."
    )


def _notes(parts: _Parts) -> list[str]:
    trainer, count = parts.trainer, len(parts.plans.classes)
    notes = []
    if not trainer.is_known:
        notes.append(
            f"{trainer.name} is no trainer of nnU-Net 1.7.1: the network fits its weights; "
            "activation, mirroring and labels are taken to be "
            + ("the usual ones." if not trainer.options else "what its name says.")
        )
    if not trainer.mirrors:
        notes.append(f"{trainer.name} trained without mirrored images, so none are predicted.")
    if parts.plans.classes != tuple(range(1, count + 1)) and not trainer.has_regions:
        notes.append(
            f"The training data had the labels {', '.join(map(str, parts.plans.classes))}; the "
            f"model writes 1 to {count}, as the original does."
        )
    return notes
