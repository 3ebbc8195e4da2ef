"""Train folds of a configuration, bundle their weights, and judge them on whole volumes."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from medseg.api.cascade import ensure_previous_stage, previous_segmentations
from medseg.api.fold import train_fold
from medseg.api.fold_record import num_finished
from medseg.api.fold_run import FoldRun
from medseg.api.lengths import requested_length
from medseg.api.networks import apply_network, scaled_patch
from medseg.api.recipes import read_recipe
from medseg.api.run_folder import check_run, claim_run, read_split
from medseg.api.validation import validate_fold, write_run_bundle
from medseg.data.splits import Split, make_splits, propose_splits, settle_splits
from medseg.data.workspace import DEFAULT_WORKSPACE, DatasetFolder, Workspace
from medseg.errors import BundleError, ConfigError, DatasetError
from medseg.schema.metrics import Metrics
from medseg.schema.plans import Plans
from medseg.schema.recipe import Recipe
from medseg.train.distributed import current

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What `train` made."""

    path: Path
    """The run's folder."""
    bundle: Path
    """The bundle with all folds trained so far."""
    metrics: dict[str, Metrics]
    """Fold -> full-volume validation; the fold "all" has none."""
    is_main: bool = True
    """Whether this process is the one, of several that trained together, that validated."""


def train(  # noqa: PLR0913 - one option of the command each
    dataset: str | Path,
    config: str,
    fold: int | str,
    *,
    plans: str = "nnunet",
    recipe: str | Path = "default",
    set: Sequence[str] | Mapping[str, Any] | None = None,  # noqa: A002 - the command's name
    name: str | None = None,
    budget: str | float | None = None,
    epochs: int | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    validate_only: bool = False,
    restart: bool = False,
    extend: bool = False,
    validate_every: int | None = None,
    init_from: str | Path | None = None,
    track: Sequence[str] | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    progress: bool = False,
    started: float | None = None,
    neighbours: int = 1,
) -> Run:
    """Train one fold, all folds one after another ("cv"), or one model on every case ("all").

    The same call again goes on where it stopped; a finished fold is left alone.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        config: Configuration of the plans, such as "3d_fullres".
        fold: 0 to N-1, "all" or "cv".
        plans: Name of the plans.
        recipe: Name or path of a recipe.
        set: Changes to the recipe: "path.to.field=value" strings or a mapping.
        name: Name of the run; None takes the recipe's.
        budget: Wall-clock time for each fold, such as "10m" or "4h" (or seconds): the schedule is
            fitted to end within it.
        epochs: Length in epochs instead of the recipe's.
        iterations: Length in optimiser steps instead of the recipe's.
        seed: Seed of weights, patches and augmentation; None: 0.
        device: "auto", "cpu", "cuda:N" or "mps".
        validate_only: Judge the weights that are there; train nothing.
        restart: Throw away what this fold has and start anew.
        extend: Train a finished fold on, with a new schedule of the length given.
        validate_every: Epochs between two validations at full volume, which then choose "best".
        init_from: Bundle or run whose weights the network starts from, as far as they fit.
        track: Services that are told of every epoch: "tensorboard", "wandb", "mlflow".
        workspace: Folder that holds what medseg makes.
        progress: Show progress bars on standard error.
        started: `time.monotonic()` that the budget counts from; None: now.
        neighbours: Trainings on this machine that share its memory, this one included.

    Raises:
        ConfigError: If an option, the recipe or the fold does not fit.
        DatasetError: If the dataset has not been preprocessed.
        PlanError: If the plans lack the configuration.
        BundleError: If there is nothing to validate.
    """
    started = time.monotonic() if started is None else started
    length = requested_length(budget, epochs, iterations)
    _check_options(validate_only=validate_only, restart=restart, extend=extend)
    folder, _ = Workspace(Path(workspace)).find(dataset)
    path = folder.run_path(plans, config, run_name(name, recipe))
    resolved = _recipe_of(path) if validate_only else read_recipe(recipe, set)
    narrowed = narrowed_plans(folder.plans(plans), config, resolved)
    check_run(path, resolved, narrowed, folder.spec())
    splits = _splits(folder, fold)
    if not restart:
        splits = {name: _kept(path / name, new, folder) for name, new in splits.items()}
    common = FoldRun(
        folder=folder,
        plans=narrowed,
        config=config,
        recipe=resolved,
        recipe_name=Path(str(recipe)).stem,
        path=path,
        fold="",
        split=Split(train=(), validation=()),
        seed=seed,
        device=device,
        length=length,
        extends=extend,
        validate_every=validate_every,
        init_from=None if init_from is None else Path(init_from),
        trackers=tuple(track or ()),
        neighbours=neighbours,
        started=started,
        progress=progress,
        processes=current(),
    )
    if not validate_only:
        first_stage = partial(
            train,
            dataset,
            str(common.configuration.previous_stage),
            plans=plans,
            recipe=recipe,
            set=set,
            name=name,
            budget=budget,
            epochs=epochs,
            iterations=iterations,
            seed=seed,
            device=device,
            workspace=workspace,
            progress=progress,
        )
        ensure_previous_stage(common, splits, train=first_stage)
    metrics = {}
    fewest = min(num_finished(replace(common, fold=name)) for name in splits)
    for number, (fold_name, split) in enumerate(splits.items()):
        is_first = number == 0 and common.configuration.previous_stage is None
        begun = started if is_first else time.monotonic()
        run = replace(common, fold=fold_name, split=split, started=begun)
        run = replace(run, extends=extend and num_finished(run) == fewest)
        if not validate_only:
            previous = partial(previous_segmentations, run)
            train_fold(run, restart=restart, on_start=partial(_claim, run), previous=previous)
        if not run.processes.is_main:
            continue
        bundle = write_run_bundle(run)
        if split.validation:
            metrics[fold_name] = validate_fold(run, bundle, again=validate_only)
    is_main = common.processes.is_main
    return Run(path=path, bundle=path / "bundle", metrics=metrics, is_main=is_main)


def folds_of(
    dataset: str | Path,
    config: str,
    *,
    plans: str = "nnunet",
    recipe: str | Path = "default",
    set: Sequence[str] | Mapping[str, Any] | None = None,  # noqa: A002 - the command's name
    name: str | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> tuple[Path, list[str], str | None]:
    """Return a run's folder, its folds, and the configuration of the stage before, if it has one.

    The options are `train`'s.

    Raises:
        MedsegError: If the options do not fit, as far as that is known without reading cases.
    """
    folder, _ = Workspace(Path(workspace)).find(dataset)
    path = folder.run_path(plans, config, run_name(name, recipe))
    resolved = read_recipe(recipe, set)
    narrowed = narrowed_plans(folder.plans(plans), config, resolved)
    check_run(path, resolved, narrowed, folder.spec())
    return path, list(_splits(folder, "cv")), narrowed.configurations[config].previous_stage


def _check_options(*, validate_only: bool, restart: bool, extend: bool) -> None:
    given = {"validate-only": validate_only, "restart": restart, "extend": extend}
    names = [name for name, value in given.items() if value]
    if len(names) > 1:
        raise ConfigError(
            f"{' and '.join(names)} exclude each other: validate-only judges what is there, "
            "restart deletes it, extend trains on. Give one."
        )


def run_name(name: str | None, recipe: str | Path) -> str:
    """Return the last part of a run's folder name.

    Raises:
        ConfigError: If the name is none for a folder.
    """
    chosen = Path(str(recipe)).stem if name is None else name
    if not re.fullmatch(r"[\w.-]+", chosen) or chosen.startswith("."):
        raise ConfigError(
            f"the name of the run is {chosen!r}; expected letters, digits, '_', '-' and '.' only."
        )
    return chosen


def _recipe_of(path: Path) -> Recipe:
    """Return the recipe a run was trained with."""
    if not (path / "recipe.yaml").is_file():
        raise BundleError(f"{path}: no such run. Train it, or check --plans, --recipe and --name.")
    return read_recipe(path / "recipe.yaml")


def _splits(folder: DatasetFolder, fold: int | str) -> dict[str, Split]:
    """Return fold name -> split for 0..N-1, "all" or "cv"."""
    spec = folder.spec()
    cases = [case for case, files in spec.cases.items() if files.segmentation]
    if str(fold) == "all":
        return {"all": Split(train=tuple(sorted(cases)), validation=())}
    settled = propose_splits(folder.splits_path, spec)
    for message in settled.messages:
        logger.warning("%s", message)
    labelled = {case: spec.cases[case] for case in cases}
    splits = settled.splits or make_splits(labelled)
    named = {f"fold_{number}": split for number, split in enumerate(splits)}
    text = str(fold).removeprefix("fold_")
    name = f"fold_{int(text)}" if text.isdigit() else text
    if name != "cv" and name not in named:
        raise ConfigError(
            f"fold is {str(fold)!r}; expected 0 to {len(splits) - 1}, 'all' or 'cv' "
            f"({folder.path.name!r} is split into {len(splits)} folds)."
        )
    return named if name == "cv" else {name: named[name]}


def _kept(fold_path: Path, split: Split, folder: DatasetFolder) -> Split:
    """Return the split a fold was started with; `split` for a new one.

    Raises:
        DatasetError: If a case of an unfinished fold is gone.
    """
    stored = read_split(fold_path)
    if stored is None:
        return split
    known = folder.spec().cases
    gone = [case for case in (*stored.train, *stored.validation) if case not in known]
    if gone and not (fold_path / "weights" / "final.safetensors").is_file():
        raise DatasetError(
            f"{fold_path}: started with {len(gone)} case{'s' * (len(gone) > 1)} the dataset no "
            f"longer has ({', '.join(gone[:5])}). Bring them back, or train the fold anew with "
            "--restart."
        )
    return stored


def narrowed_plans(plans: Plans, config: str, recipe: Recipe) -> Plans:
    """Return the plans with the one configuration, as the recipe changes it."""
    configuration = apply_network(plans.configuration(config), recipe.network)
    patch_size = scaled_patch(configuration, recipe.sampling.patch_fraction)
    configuration = configuration.model_copy(update={"patch_size": patch_size})
    return plans.model_copy(update={"configurations": {config: configuration}})


def _claim(run: FoldRun) -> None:
    """Write what a new run is, and the splits of a new dataset."""
    if not run.processes.is_main:
        return
    if run.split.validation:
        settle_splits(run.folder.splits_path, run.folder.spec())
    claim_run(run.path, run.recipe, run.plans, run.folder.spec())
