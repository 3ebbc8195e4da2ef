"""Bundles: folders sufficient for inference. Written whole or not at all, verified when read.

```text
BUNDLE/
  bundle.json                        BundleManifest, with the sha256 of every other file
  dataset.json                       DatasetSpec without cases
  plans.json                         Plans with exactly one configuration
  training_cases.json                TrainingCases; optional
  postprocessing.json                Postprocessing; optional
  weights/fold_0.safetensors         checkpoint "final"; folds are fold_0 ... or all
  weights/fold_0.best.safetensors    any other checkpoint: its name before the ending
  members/previous/                  the whole bundle of the stage before, in a cascade
```
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from medseg.bundles.files import MANIFEST as MANIFEST  # callers know it by this module
from medseg.bundles.files import (
    MEMBERS,
    checksums,
    copy_bundle,
    described,
    kind_of,
    member_manifest,
    read_listed,
    read_part,
    verify,
    written_whole,
)
from medseg.errors import BundleError, near_names
from medseg.labels import LabelScheme
from medseg.models.weights import save_weights
from medseg.schema.base import write
from medseg.schema.bundle import BundleManifest, Orientation, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Configuration, Plans
from medseg.schema.postprocessing import Postprocessing
from medseg.schema.training_cases import TrainingCases

TRAINING = "training_cases.json"
POSTPROCESSING = "postprocessing.json"
PREVIOUS = f"{MEMBERS}/previous"
"""Where a cascade holds the bundle of the stage before."""
Tensors = Mapping[str, torch.Tensor]
Weights = Tensors | Path | Callable[[], Tensors]
"""Tensors by name; a safetensors file, which is copied; or what reads them when it is their turn,
so that the folds are never in memory together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk, verified."""

    folder: Path
    manifest: BundleManifest
    spec: DatasetSpec
    """Channels and labels."""
    plans: Plans
    """Holds one configuration."""
    training: TrainingCases | None = None
    """What the training cases were like; None in bundles that do not say."""
    postprocessing: Postprocessing | None = None
    """What is done to a segmentation after the network; None where nothing is."""
    previous: Bundle | None = None
    """The stage before, in a cascade."""

    @property
    def configuration_name(self) -> str:
        """Return the name of the bundle's configuration."""
        return self.manifest.configuration

    @property
    def configuration(self) -> Configuration:
        """Return the bundle's configuration."""
        return self.plans.configurations[self.manifest.configuration]

    def select_folds(self, folds: Sequence[str | int] | None) -> tuple[str, ...]:
        """Return fold names for what a user wrote (0, "0", "fold_0", "all").

        None takes every numbered fold, or "all" where it is the only one.

        Raises:
            BundleError: If a fold has no weights here.
        """
        if folds is None:
            numbered = tuple(fold for fold in self.manifest.folds if fold != "all")
            return numbered or self.manifest.folds
        wanted = [f"fold_{fold}" if str(fold).isdigit() else str(fold) for fold in folds]
        missing = [fold for fold in wanted if fold not in self.manifest.folds]
        if missing or not wanted:
            raise BundleError(
                f"{self.folder}: no weights for {', '.join(missing) or 'an empty list of folds'}; "
                f"it holds {', '.join(self.manifest.folds)}. Ask for those, or train the fold."
            )
        return tuple(dict.fromkeys(wanted))

    def weights(self, fold: str, checkpoint: str = "final") -> Path:
        """Return the weight file of one fold.

        Raises:
            BundleError: If the fold has no such checkpoint.
        """
        path = self.folder / weights_name(fold, checkpoint)
        if weights_name(fold, checkpoint) not in self.manifest.sha256:
            known = list(self.manifest.checkpoints)
            raise BundleError(
                f"{self.folder}: no checkpoint {checkpoint!r} of {fold}; expected one of: "
                f"{', '.join(known)}.{near_names(checkpoint, known)}"
            )
        return path


def weights_name(fold: str, checkpoint: str) -> str:
    """Return the relative path of one weight file.

    Examples:
        >>> weights_name("fold_0", "final"), weights_name("all", "best")
        ('weights/fold_0.safetensors', 'weights/all.best.safetensors')
    """
    middle = "" if checkpoint == "final" else f".{checkpoint}"
    return f"weights/{fold}{middle}.safetensors"


def write_bundle(  # noqa: PLR0913 - the parts of a bundle, all but its place by keyword
    folder: Path,
    *,
    spec: DatasetSpec,
    plans: Plans,
    configuration: str,
    weights: Mapping[str, Mapping[str, Weights]],
    semantics: Semantics,
    orientation: Orientation = "canonical",
    recipe: str = "",
    training: TrainingCases | None = None,
    postprocessing: Postprocessing | None = None,
    previous: Path | None = None,
) -> Bundle:
    """Write a bundle; an existing one at this place is replaced whole.

    Args:
        folder: Where the bundle goes.
        spec: The dataset; its cases and its source folder are left out.
        plans: The plans; only `configuration` is kept.
        configuration: Name of the configuration the weights belong to.
        weights: Fold ("fold_0" ... or "all") -> checkpoint ("final", "best") -> weights.
        semantics: How a prediction is put together.
        orientation: Frame images are brought to.
        recipe: Name of the recipe the weights were trained with.
        training: What the training cases were like, for the quality control of predictions.
        postprocessing: What is done to a segmentation after the network.
        previous: Bundle of the stage before, for the second stage of a cascade; it is copied whole.

    Raises:
        BundleError: If there are no weights, a fold lacks "final", `folder` holds something that
            is not a bundle, or the stage before is missing, lacks a fold or does not fit.
        PlanError: If the plans do not hold `configuration`.
    """
    folder = Path(folder)
    _check_weights(folder, weights)
    chosen = {configuration: plans.configuration(configuration)}
    with written_whole(folder) as part:
        write(
            part / "dataset.json",
            spec.model_copy(update={"cases": {}, "source": "", "description": ""}),
        )
        write(part / "plans.json", plans.model_copy(update={"configurations": chosen}))
        if training is not None:
            write(part / TRAINING, training)
        if postprocessing is not None:
            write(part / POSTPROCESSING, postprocessing)
        _write_weights(part, weights)
        if previous is not None:
            copy_bundle(read_bundle(previous).folder, part / PREVIOUS)
        manifest = BundleManifest(
            kind="single" if previous is None else "cascade",
            configuration=configuration,
            recipe=recipe,
            orientation=orientation,
            semantics=semantics,
            folds=tuple(weights),
            checkpoints=_shared_checkpoints(weights),
            sha256=checksums(part),
            medseg_version=metadata.version("medseg"),
        )
        write(part / MANIFEST, manifest)
        if problems := _cascade_problems(read_bundle(part)):
            raise BundleError("\n".join([f"{folder}: not written.", *problems]))
    return _open(folder, manifest)  # verified before it was put here


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle, and that of a stage before, and verify the checksum of every file they list.

    Raises:
        BundleError: If it is missing, damaged, incomplete, of a newer format or of an unknown
            kind; all damaged files are listed at once.
    """
    folder = Path(folder)
    if (kind := kind_of(folder)) in ("ensemble", "chain"):
        raise BundleError(
            f"{folder}: several models in one bundle (kind {kind!r}); expected a single model. "
            f"Give one of its members, a folder in {folder / MEMBERS}."
        )
    manifest = read_part(BundleManifest, folder / MANIFEST)
    needed = ["dataset.json", "plans.json"]
    needed += [member_manifest("previous")] if manifest.kind == "cascade" else []
    needed += [weights_name(fold, name) for fold in manifest.folds for name in manifest.checkpoints]
    verify(folder, manifest.sha256, needed)
    bundle = _open(folder, manifest)
    if list(bundle.plans.configurations) != [manifest.configuration]:
        raise BundleError(
            f"{folder}/plans.json: holds {', '.join(bundle.plans.configurations) or 'nothing'}; "
            f"expected exactly the configuration {manifest.configuration!r}. "
            "Write the bundle again."
        )
    return bundle


def _open(folder: Path, manifest: BundleManifest) -> Bundle:
    """Return the parts of a bundle whose files are known to be whole."""
    return Bundle(
        folder=folder,
        manifest=manifest,
        spec=read_part(DatasetSpec, folder / "dataset.json"),
        plans=read_part(Plans, folder / "plans.json"),
        training=read_listed(TrainingCases, folder / TRAINING, manifest.sha256),
        postprocessing=read_listed(Postprocessing, folder / POSTPROCESSING, manifest.sha256),
        previous=read_bundle(folder / PREVIOUS) if manifest.kind == "cascade" else None,
    )


def find_bundle(path: Path) -> Path:
    """Return the bundle folder a user means: a bundle, or a training run that holds one.

    Raises:
        BundleError: Saying what is there and what was expected.
    """
    path = Path(path)
    for folder in (path, path / "bundle", path.parent if path.name == MANIFEST else path):
        if (folder / MANIFEST).is_file():
            return folder
    raise BundleError(
        f"{path}: no model there ({described(path)}). Expected a bundle (a folder with {MANIFEST})"
        " or a training run (a folder with bundle/, which appears when its first fold ends)."
    )


def _check_weights(folder: Path, weights: Mapping[str, Mapping[str, Weights]]) -> None:
    if not weights:
        raise BundleError(f"{folder}: a bundle needs the weights of at least one fold, got none.")
    lacking = sorted(fold for fold, entries in weights.items() if "final" not in entries)
    if lacking:
        raise BundleError(f"{folder}: no 'final' weights for {', '.join(lacking)}.")


def _shared_checkpoints(
    weights: Mapping[str, Mapping[str, Weights]],
) -> tuple[str, ...]:
    """Return the checkpoints that every fold has, "final" first."""
    shared = set.intersection(*(set(entries) for entries in weights.values()))
    return ("final", *sorted(shared - {"final"}))


def _write_weights(part: Path, weights: Mapping[str, Mapping[str, Weights]]) -> None:
    (part / "weights").mkdir()
    for fold, entries in weights.items():
        for checkpoint, content in entries.items():
            target = part / weights_name(fold, checkpoint)
            if isinstance(content, Path):
                if not content.is_file():
                    raise BundleError(f"{content}: weights of {fold} are missing; train the fold.")
                shutil.copyfile(content, target)
                continue
            tensors = content() if callable(content) else content
            save_weights(target, tensors, {"fold": fold, "checkpoint": checkpoint})


def check_supported(bundle: Bundle) -> None:
    """Refuse a cascade whose stages do not fit together.

    Raises:
        BundleError: With everything that does not fit.
    """
    if problems := _cascade_problems(bundle):
        raise BundleError(
            f"{bundle.folder}: cannot be predicted with: {'; '.join(problems)}. "
            "Write the bundle again, or use another."
        )
    if bundle.previous is not None:
        check_supported(bundle.previous)


def _cascade_problems(bundle: Bundle) -> list[str]:
    """Return what keeps the two stages of a cascade from fitting together, in words."""
    wanted, before = bundle.configuration.previous_stage, bundle.previous
    name = f"configuration {bundle.configuration_name!r}"
    if before is None:
        return []  # what the stage before found is then handed over with each case
    pairs = {
        "the configuration": (wanted, before.configuration_name),
        "channels": (bundle.spec.channels, before.spec.channels),
        "labels": (
            LabelScheme.from_spec(bundle.spec).values,
            LabelScheme.from_spec(before.spec).values,
        ),
        "network_axes": (bundle.plans.network_axes, before.plans.network_axes),
    }
    problems = [
        f"{PREVIOUS}: {what} is {found}, {name} expects {expected}"
        for what, (expected, found) in pairs.items()
        if expected != found
    ]
    if lacking := [fold for fold in bundle.manifest.folds if fold not in before.manifest.folds]:
        problems.append(f"{PREVIOUS}: no weights of {', '.join(lacking)}")
    return problems
