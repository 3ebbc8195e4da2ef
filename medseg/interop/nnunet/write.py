"""Write a model as a folder of nnU-Net v2, which loads it strictly and predicts with it.

```text
FOLDER/                                       one model; of a cascade each stage in a folder of its
  dataset.json  plans.json                    own below, nnUNetTrainer__PLANS__CONFIGURATION
  fold_0/checkpoint_final.pth                 or checkpoint_best.pth; fold "all": fold_all/
  crossval_results_folds_0/postprocessing.json    steps that nnU-Net has, if there are any
FOLDER/medseg_export.json                     ExportedFolder
```
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.errors import BundleError, ConfigError
from medseg.interop.folder import require_replaceable, whole_folder
from medseg.interop.nnunet.foreign import ForeignModel, Weights
from medseg.interop.nnunet.write_plans import (
    dataset_of,
    mirror_axes_of,
    notes_of,
    place_of_norm,
    plans_of,
    problems_of,
)
from medseg.labels import LabelScheme
from medseg.schema.base import FILE_NAME, FORMAT_VERSION, Schema, read, write, write_json
from medseg.schema.postprocessing import KeepLargest, Postprocessing, Step

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MARK = "medseg_export.json"
"""What tells an export from a model that nnU-Net trained, which is never replaced."""
TRAINER = "nnUNetTrainer"
_KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
_FULL_CONNECTIVITY = 3


class ExportedStage(Schema):
    """One model folder."""

    folder: str
    """Relative to the export; "." for a model of one stage."""
    configuration: str
    """Name of its configuration."""
    folds: tuple[str, ...]
    """Folds as nnU-Net's commands name them: "0" ... or "all"."""
    checkpoint: str
    """File in the folder of each fold."""
    previous_stage: str | None = None
    """Configuration whose label maps it takes."""


class ExportedFolder(Schema):
    """What an export wrote: `medseg_export.json`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    channels: tuple[str, ...]
    """Channels of a case, in the order of its files."""
    stages: tuple[ExportedStage, ...]
    """In the order in which they predict."""
    files: tuple[str, ...]
    """Every other file, relative to the export."""
    notes: tuple[str, ...] = ()
    """What nnU-Net does otherwise, or not by itself; each a sentence."""
    medseg_version: str = ""
    """Version of medseg that wrote it."""


def require_place(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export.

    Raises:
        ConfigError: Saying what is there.
    """
    require_replaceable(folder, _own_files)


def require_expressible(stages: Sequence[ForeignModel]) -> None:
    """Refuse models that nnU-Net v2 cannot predict with as they are meant.

    Raises:
        BundleError: With everything that has no counterpart.
    """
    problems = dict.fromkeys(problem for stage in stages for problem in problems_of(stage))
    names = [name for stage in stages for name in (stage.plans.name, stage.configuration)]
    problems |= dict.fromkeys(
        f"{name!r} cannot be part of a folder's name; expected letters, digits and . + - _"
        for name in names
        if not FILE_NAME.fullmatch(name)
    )
    if problems:
        count = f"{len(problems)} thing{'s' if len(problems) > 1 else ''}"
        lines = [f"{stages[-1].folder}: {count} that nnU-Net v2 has no counterpart of:"]
        lines += [f"  {problem}" for problem in problems]
        lines.append("Nothing was written. Predict with medseg, or export to ONNX.")
        raise BundleError("\n".join(lines))


def write_v2(
    folder: Path, stages: Sequence[ForeignModel], *, num_training: int = 0
) -> ExportedFolder:
    """Write a model, or the stages of a cascade; the folder appears whole or not at all.

    Args:
        folder: Where the export goes; an earlier one there is replaced.
        stages: Models in the order in which they predict; one, but for a cascade. All folds have
            the same one checkpoint.
        num_training: Number of training cases.

    Raises:
        ConfigError: If the folder holds something else.
        BundleError: If nnU-Net v2 cannot express a model, or weights are damaged.
    """
    require_expressible(stages)
    with whole_folder(folder, _own_files) as part:
        written = []
        for stage in stages:
            name = (
                "." if len(stages) == 1 else f"{TRAINER}__{stage.plans.name}__{stage.configuration}"
            )
            place = part / name
            write_json(place / "dataset.json", dataset_of(stage, num_training))
            write_json(place / "plans.json", plans_of(stages, stage))
            checkpoint = _write_weights(place, stage)
            _write_postprocessing(place, stage)
            written.append(
                ExportedStage(
                    folder=name,
                    configuration=stage.configuration,
                    folds=tuple(_fold(fold) for fold in stage.weights),
                    checkpoint=checkpoint,
                    previous_stage=stage.plans.configuration(stage.configuration).previous_stage,
                )
            )
        exported = ExportedFolder(
            channels=stages[-1].spec.channels,
            stages=tuple(written),
            files=tuple(_files(part)),
            notes=tuple(dict.fromkeys(note for stage in stages for note in _notes(stage))),
            medseg_version=metadata.version("medseg"),
        )
        write(part / MARK, exported)
    return exported


def with_duplicates(tensors: Mapping[str, Tensor], *, place_of_norm: int) -> dict[str, Tensor]:
    """Return tensors by all the names under which nnU-Net's networks hold them.

    A block knows its convolution and its norm also by their place in `all_modules`, and the decoder
    knows the whole encoder. The tensors are the same ones, so a file holds each once.
    """
    places = {"conv": 0, "norm": place_of_norm}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        named[name] = tensor
        *block, part, last = name.split(".")
        if part in places:
            named[".".join([*block, "all_modules", str(places[part]), last])] = tensor
    inside = {name: tensor for name, tensor in named.items() if name.startswith("encoder.")}
    return {**named, **{f"decoder.{name}": tensor for name, tensor in inside.items()}}


def _write_weights(place: Path, model: ForeignModel) -> str:
    """Write a checkpoint for each fold, one at a time, and return the name of the file."""
    name = ""
    for fold, entries in model.weights.items():
        ((checkpoint, weights),) = entries.items()
        name = f"checkpoint_{checkpoint}.pth"
        path = place / f"fold_{_fold(fold)}" / name
        path.parent.mkdir(parents=True)
        _save(path, _checkpoint(model, fold, weights))
        logger.info("%s of %s written", name, fold)
    return name


def _checkpoint(model: ForeignModel, fold: str, weights: Weights) -> dict[str, Any]:
    """Return what nnU-Net reads of a checkpoint when it predicts."""
    architecture = model.plans.configuration(model.configuration).architecture
    return {
        "network_weights": with_duplicates(weights(), place_of_norm=place_of_norm(architecture)),
        "trainer_name": TRAINER,
        "init_args": {"configuration": model.configuration, "fold": _fold(fold)},
        "inference_allowed_mirroring_axes": mirror_axes_of(model.semantics),
    }


def _save(path: Path, values: dict[str, Any]) -> None:
    import torch

    torch.save(values, path)  # noqa: TID251 - nnU-Net's format; tensors and plain values alone


def _write_postprocessing(place: Path, model: ForeignModel) -> None:
    """Write the steps that nnU-Net has, for a reader; it would itself need code in a pickle."""
    groups = [group for step in _steps(model) for group in _largest_of(step, model)]
    if not groups:
        return
    folds = "_".join(_fold(fold) for fold in model.weights)
    values = {
        "postprocessing_fns": [_KEEP_LARGEST] * len(groups),
        "postprocessing_kwargs": [{"labels_or_regions": group} for group in groups],
    }
    write_json(place / f"crossval_results_folds_{folds}" / "postprocessing.json", values)


def _steps(model: ForeignModel) -> tuple[Step, ...]:
    return (model.postprocessing or Postprocessing()).steps


def _largest_of(step: Step, model: ForeignModel) -> list[int | list[int]]:
    """Return the values of each mask of which the largest piece stays; none: no such step."""
    if not isinstance(step, KeepLargest) or step.below_mm3 is not None:
        return []
    if step.connectivity != _FULL_CONNECTIVITY:
        return []
    structures = LabelScheme.from_spec(model.spec).structures
    groups = [
        structures[entry] if isinstance(entry, str) else (entry,) for entry in step.structures
    ]
    if step.together:
        groups = [tuple(sorted({value for group in groups for value in group}))]
    return [group[0] if len(group) == 1 else list(group) for group in groups]


def _notes(model: ForeignModel) -> Iterator[str]:
    yield from notes_of(model)
    steps = _steps(model)
    kept = [step for step in steps if _largest_of(step, model)]
    if kept:
        yield (
            f"postprocessing: nnU-Net does not keep the largest pieces by itself ({len(kept)} of "
            f"{len(steps)} steps, in postprocessing.json)."
        )
    if others := [step.kind for step in steps if step not in kept]:
        yield f"postprocessing: nnU-Net cannot do {', '.join(others)}; left out."


def _fold(fold: str) -> str:
    return fold.removeprefix("fold_")


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _own_files(folder: Path) -> set[str] | None:
    """Return the names of what an earlier export left, without folders that hold more than it."""
    try:
        exported = read(ExportedFolder, folder / MARK)
    except ConfigError:
        return None
    more = {name.split("/")[0] for name in set(_files(folder)) - {MARK, *exported.files}}
    return {MARK, *(name.split("/")[0] for name in exported.files)} - more
