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

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch

from medseg.errors import BundleError, ConfigError, near_names
from medseg.labels import LabelScheme
from medseg.models.weights import save_weights
from medseg.schema.base import FORMAT_VERSION, Schema, read, write
from medseg.schema.bundle import BundleManifest, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Configuration, Plans
from medseg.schema.postprocessing import Postprocessing
from medseg.schema.training_cases import TrainingCases

MANIFEST = "bundle.json"
TRAINING = "training_cases.json"
POSTPROCESSING = "postprocessing.json"
PREVIOUS = "members/previous"
"""Where a cascade holds the bundle of the stage before."""
Tensors = Mapping[str, torch.Tensor]
S = TypeVar("S", bound=Schema)


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
    weights: Mapping[str, Mapping[str, Tensors | Path]],
    semantics: Semantics,
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
        weights: Fold ("fold_0" ... or "all") -> checkpoint ("final", "best") -> tensors by name,
            or a safetensors file, which is copied.
        semantics: How a prediction is put together.
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
    _check_target(folder, weights)
    chosen = {configuration: plans.configuration(configuration)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        part.chmod(0o755)
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
            _copy_bundle(read_bundle(previous), part / PREVIOUS)
        manifest = BundleManifest(
            kind="single" if previous is None else "cascade",
            configuration=configuration,
            recipe=recipe,
            semantics=semantics,
            folds=tuple(sorted(weights)),
            checkpoints=_shared_checkpoints(weights),
            sha256=_checksums(part),
            medseg_version=metadata.version("medseg"),
        )
        write(part / MANIFEST, manifest)
        if problems := _cascade_problems(_open(part, manifest)):
            raise BundleError("\n".join([f"{folder}: not written.", *problems]))
        _replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle, and that of a stage before, and verify the checksum of every file they list.

    Raises:
        BundleError: If it is missing, damaged, incomplete, of a newer format or of an unknown
            kind; all damaged files are listed at once.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: not a bundle ({_describe(folder)}); expected {MANIFEST}.")
    manifest = _read(BundleManifest, folder / MANIFEST)
    _verify(folder, manifest)
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
        spec=_read(DatasetSpec, folder / "dataset.json"),
        plans=_read(Plans, folder / "plans.json"),
        training=_read_listed(TrainingCases, folder / TRAINING, manifest),
        postprocessing=_read_listed(Postprocessing, folder / POSTPROCESSING, manifest),
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
        f"{path}: no model there ({_describe(path)}). Expected a bundle (a folder with {MANIFEST})"
        " or a training run (a folder with bundle/, which appears when its first fold ends)."
    )


def _describe(path: Path) -> str:
    if not path.exists():
        return "no such file or folder"
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    return f"a folder with {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def _check_target(folder: Path, weights: Mapping[str, Mapping[str, Tensors | Path]]) -> None:
    if not weights:
        raise BundleError(f"{folder}: a bundle needs the weights of at least one fold, got none.")
    lacking = sorted(fold for fold, entries in weights.items() if "final" not in entries)
    if lacking:
        raise BundleError(f"{folder}: no 'final' weights for {', '.join(lacking)}.")
    if (
        folder.exists()
        and not (folder / MANIFEST).is_file()
        and _describe(folder)[:8] != "an empty"
    ):
        raise BundleError(
            f"{folder}: will not be replaced by a bundle, because it is none "
            f"({_describe(folder)}). Choose another place."
        )


def _shared_checkpoints(
    weights: Mapping[str, Mapping[str, Tensors | Path]],
) -> tuple[str, ...]:
    """Return the checkpoints that every fold has, "final" first."""
    shared = set.intersection(*(set(entries) for entries in weights.values()))
    return ("final", *sorted(shared - {"final"}))


def _write_weights(part: Path, weights: Mapping[str, Mapping[str, Tensors | Path]]) -> None:
    (part / "weights").mkdir()
    for fold, entries in weights.items():
        for checkpoint, content in entries.items():
            target = part / weights_name(fold, checkpoint)
            if isinstance(content, Mapping):
                tensors = dict(content)
                save_weights(target, tensors, {"fold": fold, "checkpoint": checkpoint})
            elif Path(content).is_file():
                shutil.copyfile(content, target)
            else:
                raise BundleError(f"{content}: weights of {fold} are missing; train the fold.")


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy a bundle's own files, and nothing that may lie beside them."""
    for name in (MANIFEST, *bundle.manifest.sha256):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(bundle.folder / name, target / name)
    if bundle.previous is not None:
        _copy_bundle(bundle.previous, target / PREVIOUS)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name where the disk can, else copy it; bundles are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file; of a member that of its manifest, which has the others."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: _sha256(path)
        for name, path in sorted(files.items())
        if path.is_file() and (not name.startswith("members/") or name == f"{PREVIOUS}/{MANIFEST}")
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(part: Path, folder: Path) -> None:
    """Rename a finished folder into place; what was there comes back if that fails."""
    if not folder.exists():
        part.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    try:
        folder.rename(old / folder.name)
        try:
            part.rename(folder)
        except BaseException:
            (old / folder.name).rename(folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _read(schema: type[S], path: Path) -> S:
    try:
        return read(schema, path)
    except ConfigError as error:
        raise BundleError(f"{error}") from None


def _read_listed(schema: type[S], path: Path, manifest: BundleManifest) -> S | None:
    """Read a file that not every bundle has; one that is not listed is not the bundle's."""
    return _read(schema, path) if path.name in manifest.sha256 else None


def _verify(folder: Path, manifest: BundleManifest) -> None:
    problems = [
        f"  {name}: {problem}"
        for name, expected in sorted(manifest.sha256.items())
        if (problem := _file_problem(folder, name, expected)) is not None
    ]
    needed = ["dataset.json", "plans.json"]
    needed += [f"{PREVIOUS}/{MANIFEST}"] if manifest.kind == "cascade" else []
    needed += [weights_name(fold, name) for fold in manifest.folds for name in manifest.checkpoints]
    problems += [f"  {name}: not listed" for name in needed if name not in manifest.sha256]
    if problems:
        count = f"{len(problems)} damaged file{'s' if len(problems) > 1 else ''}"
        hint = "Copy or download the bundle again."
        raise BundleError("\n".join([f"{folder}: {count}", *problems, hint]))


def _file_problem(folder: Path, name: str, expected: str) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return "lies outside the bundle"
    path = folder / relative
    if not path.is_file():
        return "missing"
    found = _sha256(path)
    if found != expected:
        return f"sha256 is {found[:12]}..., expected {expected[:12]}..."
    return None


def check_supported(bundle: Bundle) -> None:
    """Refuse a bundle whose predictions this version cannot put together as they were meant.

    Raises:
        BundleError: With every value that is not supported.
    """
    semantics = bundle.manifest.semantics
    expected = {"average": "logits", "normalise_first": True, "gaussian_peak": 1.0}
    problems = [
        f"semantics.{name} is {getattr(semantics, name)!r}, expected {value!r}"
        for name, value in expected.items()
        if getattr(semantics, name) != value
    ]
    problems += _cascade_problems(bundle)
    if problems:
        raise BundleError(
            f"{bundle.folder}: this medseg (bundle format {FORMAT_VERSION}) cannot predict with "
            f"it: {'; '.join(problems)}. Update medseg, or use another bundle."
        )
    if bundle.previous is not None:
        check_supported(bundle.previous)


def _cascade_problems(bundle: Bundle) -> list[str]:
    """Return what keeps the two stages of a cascade from fitting together, in words."""
    wanted, before = bundle.configuration.previous_stage, bundle.previous
    name = f"configuration {bundle.configuration_name!r}"
    if before is None:
        if wanted is None:
            return []
        return [f"{name} needs the prediction of {wanted!r}, but {PREVIOUS} is missing"]
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
