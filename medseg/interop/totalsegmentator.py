"""Read the folders of TotalSegmentator's models: which tasks they make up, and as what chain.

Each part is a model of nnU-Net v2 and read as such; here is only what is done around the networks:
the resampled grid, the order of the parts, the values of their labels in the result.

Source:
    Behaviour of TotalSegmentator 2.18.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import BundleError, near_names
from medseg.interop.nnunet.found import Found, find_models
from medseg.interop.nnunet.v2_dataset import dataset_spec
from medseg.interop.nnunet.v2_files import PlansFile
from medseg.interop.nnunet.v2_plans import read_entry
from medseg.interop.nnunet.v2_values import checked, read_foreign_json
from medseg.interop.totalsegmentator_tasks import TASKS, Known, Spacing
from medseg.labels import LabelScheme
from medseg.schema.bundle import Chain, ChainPart
from medseg.schema.dataset import DatasetSpec
from medseg.schema.postprocessing import Postprocessing

_NUMBER = re.compile(r"Dataset(\d+)_.+")
_PLANS = "nnUNetPlans"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the models of a task."""

    folder: Path
    """Of the trained model, with its plans."""
    folds: tuple[str, ...]
    """Those the task uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a chain of models is made of."""

    name: str
    """Such as "total" or "total_fast"; of an unknown one that of its dataset."""
    spec: DatasetSpec
    """Channels, and the labels of the result."""
    chain: Chain
    """What is done."""
    parts: Mapping[str, Part]
    """Member of the chain -> its model. Their own postprocessing is not done."""
    postprocessing: Postprocessing | None = None
    """What is done to the merged label map."""
    notes: tuple[str, ...] = ()
    """What a user should know, each a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A task of which something is there, and that cannot be imported."""

    name: str
    reason: str
    """Why not, in words."""


def read_tasks(folder: Path) -> tuple[Task | Refused, ...]:
    """Return the tasks whose models lie in a folder.

    Args:
        folder: The tool's own folder (`.totalsegmentator`), that of its weights, an unpacked
            archive, or the folder of one dataset or model.

    Raises:
        BundleError: If there is no model in it.
    """
    models: dict[int, list[Found]] = {}
    for found in find_models(Path(folder)):
        number = _NUMBER.fullmatch(found.dataset)
        if found.version == 2 and number is not None:
            models.setdefault(int(number[1]), []).append(found)
    if not models:
        raise BundleError(
            f"{folder}: no models of TotalSegmentator there; expected folders such as "
            "Dataset297_.../TRAINER__PLANS__CONFIGURATION/fold_0 with checkpoint_final.pth. Its "
            "weights usually lie in .totalsegmentator/nnunet/results of the home folder."
        )
    known = {number for task in TASKS.values() for number in task.datasets}
    tasks = [
        _known_task(name, task, models)
        for name, task in TASKS.items()
        if set(task.datasets) & set(models)
    ]
    tasks += [_unknown_task(models[number]) for number in sorted(set(models) - known)]
    return tuple(tasks)


def choose_task(tasks: Sequence[Task | Refused], name: str | None, folder: Path) -> Task:
    """Return the task a user means; without a name the only one that can be imported.

    Raises:
        BundleError: If there is none of that name, several and no name, or it cannot be imported.
    """
    whole = [task for task in tasks if isinstance(task, Task)]
    if name is None and len(whole) == 1:
        return whole[0]
    lines = [
        f"  {task.name}" if isinstance(task, Task) else f"  {task.name}: cannot be ({task.reason})"
        for task in tasks
    ]
    chosen = next((task for task in tasks if task.name == name), None)
    if isinstance(chosen, Task):
        return chosen
    if chosen is not None:
        raise BundleError(f"{folder}: task {name!r} cannot be imported: {chosen.reason}.")
    asked = f"{len(whole)} tasks can be imported" if name is None else f"no task {name!r} there"
    near = "" if name is None else near_names(name, [task.name for task in tasks])
    raise BundleError("\n".join([f"{folder}: {asked}; name one of:{near}", *lines]))


def _known_task(name: str, known: Known, models: Mapping[int, list[Found]]) -> Task | Refused:
    if known.refusal:
        return Refused(name=name, reason=known.refusal)
    lacking = [number for number in known.datasets if number not in models]
    if lacking:
        numbers = ", ".join(f"Dataset{number:03d}" for number in lacking)
        return Refused(name=name, reason=f"it also needs {numbers}, which are not there")
    try:
        return _task(name, known, [models[number] for number in known.datasets])
    except BundleError as error:
        return Refused(name=name, reason=str(error))


def _unknown_task(models: Sequence[Found]) -> Task | Refused:
    """Return a chain of one model on the grid of its plans."""
    name = models[0].dataset
    try:
        chosen, _ = _choose(models, "3d_fullres")
        spacing = _spacing_of(chosen)
        task = _task(name, Known(datasets=(), spacing=spacing, folds=None), [models])
    except BundleError as error:
        return Refused(name=name, reason=str(error))
    size = (
        "left as they are" if spacing is None else f"resampled to {_mm(spacing)}, as its plans are"
    )
    note = f"{name} is none of the known tasks; images are {size}, with intensities as they are."
    chain = task.chain.model_copy(update={"truncate": False})
    spec = task.spec.model_copy(update={"name": name})
    return Task(name=name, spec=spec, chain=chain, parts=task.parts, notes=(note, *task.notes))


def _task(name: str, known: Known, models: Sequence[Sequence[Found]]) -> Task:
    """Return a task whose models are all there.

    Raises:
        BundleError: If a file of them makes no sense, or a fold is not there.
    """
    notes: list[str] = [*_crop_notes(known), *([known.note] if known.note else [])]
    parts, specs = {}, {}
    for candidates in models:
        found, remark = _choose(candidates, known.configuration)
        notes += remark
        member = re.sub(r"[^A-Za-z0-9_.-]", "_", found.dataset)
        parts[member] = Part(folder=found.folder, folds=found.select_folds(known.folds))
        specs[member] = _spec_of(found, notes)
    if len(specs) > 1:
        spec, values = _joined(specs)
    else:
        ((member, own),) = specs.items()
        spec, mapped = _alone(own, known.dropped)
        values = {member: mapped}
    chain = Chain(
        spacing=known.spacing,
        order=1,
        truncate=True,
        step=known.step,
        mirror=False,
        parts=tuple(ChainPart(member=member, values=own) for member, own in values.items()),
    )
    return Task(
        name=name,
        spec=spec.model_copy(update={"name": f"TotalSegmentator_{name}"}),
        chain=chain,
        parts=parts,
        postprocessing=known.postprocessing,
        notes=tuple(notes),
    )


def _crop_notes(known: Known) -> list[str]:
    if not known.crop:
        return []
    return [
        f"The original first lets another model find {known.crop}, and cuts the image to that; "
        "this bundle predicts the whole image, which takes longer and may find something elsewhere."
    ]


def _choose(models: Sequence[Found], configuration: str) -> tuple[Found, list[str]]:
    """Return the model of a dataset that the original takes, and what is to be said of others."""
    ordered = sorted(
        models,
        key=lambda m: (m.configuration != configuration, m.plans != _PLANS, m.folder.name),
    )
    chosen, others = ordered[0], [model.folder.name for model in ordered[1:]]
    notes = []
    if chosen.configuration != configuration:
        notes.append(
            f"{chosen.dataset} is expected to have the configuration {configuration}; "
            f"{chosen.configuration} is what is there."
        )
    if others:
        notes.append(
            f"{chosen.dataset} has several models; {chosen.folder.name} is taken, not "
            f"{', '.join(others)}."
        )
    return chosen, notes


def _spec_of(found: Found, notes: list[str]) -> DatasetSpec:
    """Return channels and labels of a model.

    Raises:
        BundleError: With every problem of its dataset.json.
    """
    path, problems = found.folder / "dataset.json", list[str]()
    parts = dataset_spec(read_foreign_json(path), str(path), found.dataset, problems, notes)
    if parts is None:
        raise BundleError("; ".join(problems))
    return parts[0]


def _joined(specs: Mapping[str, DatasetSpec]) -> tuple[DatasetSpec, dict[str, dict[int, int]]]:
    """Return the labels of all parts, counted on, and the way of each part's values to them.

    A name that several parts have is one label.

    Raises:
        BundleError: If parts take other channels, or one has regions.
    """
    lead = next(iter(specs.values()))
    labels, values = {"background": 0}, {}
    for member, spec in specs.items():
        if len(spec.channels) != len(lead.channels) or LabelScheme.from_spec(spec).has_regions:
            raise BundleError(
                f"{member}: its channels are {', '.join(spec.channels)} and its labels "
                f"{dict(spec.labels)}; expected {len(lead.channels)} channels, and one value for "
                "each label"
            )
        own = LabelScheme.from_spec(spec).structures
        values[member] = {
            value: labels.setdefault(label, len(labels))
            for label, (value,) in sorted(own.items(), key=lambda entry: entry[1])
        }
    return DatasetSpec(name="", channels=lead.channels, labels=dict(labels)), values


def _alone(spec: DatasetSpec, dropped: Sequence[int]) -> tuple[DatasetSpec, dict[int, int]]:
    """Return the labels of a single part without those that only help, and its values."""
    scheme = LabelScheme.from_spec(spec)
    unwanted = {scheme.background, scheme.ignore_label, *dropped}
    kept = [value for value in scheme.values if value not in unwanted]
    labels = {
        name: entry
        for name, entry in spec.labels.items()
        if name == "background" or entry not in dropped
    }
    changes = {"labels": labels, "ignore_label": None}
    return spec.model_copy(update=changes), {value: value for value in kept}


def _spacing_of(found: Found) -> Spacing | None:
    """Return the voxel size of a model's plans along canonical axes; None for one of slices.

    Raises:
        BundleError: With every problem of its plans.json.
    """
    path, problems = found.folder / "plans.json", list[str]()
    raw = read_foreign_json(path)
    plans = checked(PlansFile, raw, str(path), problems)
    entry = read_entry(raw, found.configuration, str(path), problems)
    if plans is None or entry is None:
        raise BundleError("; ".join(problems))
    if len(entry.spacing) != 3:
        return None
    place = plans.transpose_forward.index
    x, y, z = (float(entry.spacing[place(axis)]) for axis in (2, 1, 0))
    return x, y, z


def _mm(spacing: Sequence[float]) -> str:
    return f"{' x '.join(f'{size:g}' for size in spacing)} mm"
