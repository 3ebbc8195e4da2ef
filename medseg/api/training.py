"""Train folds of a configuration, bundle their weights, and judge them on whole volumes."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medseg.api.fold import FoldRun, RequestedLength, train_fold
from medseg.api.recipes import read_recipe
from medseg.api.run_folder import check_run, claim_run, read_split
from medseg.api.validation import validate_fold, write_run_bundle
from medseg.data.splits import Split, make_splits, propose_splits, settle_splits
from medseg.data.workspace import DEFAULT_WORKSPACE, DatasetFolder, Workspace
from medseg.errors import BundleError, ConfigError, DatasetError, PlanError
from medseg.schema.metrics import Metrics
from medseg.schema.plans import Configuration, Plans
from medseg.schema.recipe import NetworkRecipe, Recipe

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
    workspace: str | Path = DEFAULT_WORKSPACE,
    progress: bool = False,
    started: float | None = None,
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
        workspace: Folder that holds what medseg makes.
        progress: Show progress bars on standard error.
        started: `time.monotonic()` that the budget counts from; None: now.

    Raises:
        ConfigError: If an option, the recipe or the fold does not fit.
        DatasetError: If the dataset has not been preprocessed.
        PlanError: If the plans lack the configuration.
        BundleError: If there is nothing to validate.
    """
    started = time.monotonic() if started is None else started
    length = _length(budget, epochs, iterations)
    folder, _ = Workspace(Path(workspace)).find(dataset)
    path = folder.run_path(plans, config, _run_name(name, recipe))
    resolved = _recipe_of(path, restart) if validate_only else read_recipe(recipe, set)
    narrowed = _narrowed(folder.plans(plans), config, resolved)
    check_run(path, resolved, narrowed, folder.spec())
    metrics = {}
    splits = _splits(folder, fold)
    if not restart:
        splits = {name: _kept(path / name, new, folder) for name, new in splits.items()}
    for number, (fold_name, split) in enumerate(splits.items()):
        run = FoldRun(
            folder=folder,
            plans=narrowed,
            config=config,
            recipe=resolved,
            recipe_name=Path(str(recipe)).stem,
            path=path,
            fold=fold_name,
            split=split,
            seed=seed,
            device=device,
            length=length,
            started=started if number == 0 else time.monotonic(),
            progress=progress,
        )
        if not validate_only:
            train_fold(run, restart=restart, on_start=partial(_claim, run))
        bundle = write_run_bundle(run)
        if split.validation:
            metrics[fold_name] = validate_fold(run, bundle, again=validate_only)
    return Run(path=path, bundle=path / "bundle", metrics=metrics)


def _run_name(name: str | None, recipe: str | Path) -> str:
    chosen = Path(str(recipe)).stem if name is None else name
    if not re.fullmatch(r"[\w.-]+", chosen) or chosen.startswith("."):
        raise ConfigError(
            f"the name of the run is {chosen!r}; expected letters, digits, '_', '-' and '.' only."
        )
    return chosen


def _recipe_of(path: Path, restart: bool) -> Recipe:
    """Return the recipe a run was trained with."""
    if restart:
        raise ConfigError("validate-only judges what is there, restart deletes it; give one.")
    if not (path / "recipe.yaml").is_file():
        raise BundleError(f"{path}: no such run. Train it, or check --plans, --recipe and --name.")
    return read_recipe(path / "recipe.yaml")


def _length(
    budget: str | float | None, epochs: int | None, iterations: int | None
) -> RequestedLength:
    options = {"budget": budget, "epochs": epochs, "iterations": iterations}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both set the length of the run; give one.")
    for name, value in (("epochs", epochs), ("iterations", iterations)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1.")
    seconds = None if budget is None else parse_duration(budget)
    return RequestedLength(budget_seconds=seconds, epochs=epochs, iterations=iterations)


def apply_network(configuration: Configuration, changes: NetworkRecipe) -> Configuration:
    """Return the configuration with a recipe's changes to its network."""
    planned = configuration.architecture
    base = changes.base_features or planned.features[0]
    limit = changes.max_features or max(planned.features)
    features = planned.features
    if changes.base_features or changes.max_features:
        features = tuple(min(base * 2**stage, limit) for stage in range(len(planned.features)))
    kind = changes.kind or planned.kind
    blocks = planned.blocks_encoder
    if kind != planned.kind:
        blocks = _blocks(kind, len(features))
    architecture = planned.model_copy(
        update={"features": features, "kind": kind, "blocks_encoder": blocks}
    )
    return configuration.model_copy(update={"architecture": architecture})


def scaled_patch(configuration: Configuration, fraction: float) -> tuple[int, ...]:
    """Return the planned patch times `fraction`, in voxels.

    Each axis is rounded to a multiple of the product of the network's strides along it.
    """
    divisors = [math.prod(axis) for axis in zip(*configuration.architecture.strides, strict=True)]
    return tuple(
        min(size, max(1, round(size * fraction / divisor)) * divisor)
        for size, divisor in zip(configuration.patch_size, divisors, strict=True)
    )


def _blocks(kind: str, num_stages: int) -> tuple[int, ...]:
    """Return the usual number of encoder blocks per stage.

    Source:
        Default and residual-encoder planners of nnU-Net v2.
    """
    residual = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)
    return residual[:num_stages] if kind == "residual_unet" else (2,) * num_stages


def parse_duration(duration: str | float) -> float:
    """Return seconds.

    Raises:
        ConfigError: If it is not a positive time such as 90s, 10m or 4h.

    Examples:
        >>> parse_duration("10m"), parse_duration("1.5h"), parse_duration(30)
        (600.0, 5400.0, 30.0)
    """
    text = str(duration).strip().lower()
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(text[-1:])
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"budget is {duration!r}; expected a time such as 90s, 10m or 4h.")
    return seconds


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


def _narrowed(plans: Plans, config: str, recipe: Recipe) -> Plans:
    """Return the plans with the one configuration, as the recipe changes it."""
    configuration = apply_network(plans.configuration(config), recipe.network)
    patch_size = scaled_patch(configuration, recipe.sampling.patch_fraction)
    configuration = configuration.model_copy(update={"patch_size": patch_size})
    if configuration.previous_stage is not None:
        raise PlanError(
            f"configuration {config!r} is the second stage of a cascade, which this version does "
            f"not train yet. Train {configuration.previous_stage!r} or '3d_fullres' instead."
        )
    return plans.model_copy(update={"configurations": {config: configuration}})


def _claim(run: FoldRun) -> None:
    """Write what a new run is, and the splits of a new dataset."""
    if run.split.validation:
        settle_splits(run.folder.splits_path, run.folder.spec())
    claim_run(run.path, run.recipe, run.plans, run.folder.spec())
