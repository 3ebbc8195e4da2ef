"""train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg.cli.options import Config, Dataset, Device, PlansName, RecipeName, RunName, settings

_STARTED = time.monotonic()
"""When this process began to run medseg; a budget counts from here."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train")(train)


def train(  # noqa: PLR0913 - one option of the command each
    dataset: Dataset,
    config: Config,
    fold: Annotated[
        str, typer.Argument(metavar="FOLD", help="0 to 4, all (every case), cv (every fold).")
    ],
    plans: PlansName = "nnunet",
    recipe: RecipeName = "default",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the recipe; repeat it."),
    ] = None,
    name: RunName = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for a fold, such as 30m or 4h.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Length in epochs.")] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="Length in optimiser steps.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of weights, patches, augmentation.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=2, help="Train this often; print mean and spread.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option("--init-from", metavar="MODEL", help="Start from this model's weights."),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option("--validate-every", min=1, help="Epochs between full-volume validations."),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="tensorboard, wandb or mlflow too; repeat it."),
    ] = None,
    device: Device = "auto",
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="GPUs that share a batch; cv: or the folds.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Train a finished fold on, for the length given.")
    ] = False,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Judge the weights that are there.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what this fold has.")
    ] = False,
) -> None:
    """Train a fold; the same command again goes on where it stopped."""
    from medseg.cli.processes import joined_processes, neighbours, train_elsewhere
    from medseg.train.signals import Stopped

    options: dict[str, Any] = {
        "plans": plans,
        "recipe": recipe,
        "set": changes,
        "name": name,
        "budget": budget,
        "epochs": epochs,
        "iterations": iterations,
        "seed": seed,
        "init_from": init_from,
        "validate_every": validate_every,
        "track": track,
        "extend": extend,
        "validate_only": validate_only,
        "restart": restart,
        "workspace": settings.workspace,
        "progress": True,
        "neighbours": neighbours(),
        "started": _STARTED,
    }
    told = {**options, "seeds": seeds}
    trained = train_elsewhere((dataset, config, fold), told, gpus=gpus, device=device)
    if trained == "all":
        return
    if trained == "folds":
        options |= dict.fromkeys(("budget", "epochs", "iterations"))
        options |= {"extend": False, "restart": False}
    try:
        with joined_processes(device) as chosen:
            if seeds is None:
                _train(dataset, config, fold, {**options, "device": chosen})
            else:
                _train_seeds(seeds, dataset, config, fold, {**options, "device": chosen})
    except Stopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.exit_status) from None


def _train(dataset: str, config: str, fold: str, options: dict[str, Any]) -> None:
    from medseg.api.training import train as train_folds
    from medseg.report.table import format_metrics

    run = train_folds(dataset, config, fold, **options)
    if not run.is_main:
        return
    for fold_name, metrics in run.metrics.items():
        typer.echo(f"\n{fold_name}, full volumes:\n{format_metrics(metrics)}")
    typer.echo(f"\nModel: {run.bundle}")


def _train_seeds(seeds: int, dataset: str, config: str, fold: str, options: dict[str, Any]) -> None:
    from medseg.api.seeds import train_seeds
    from medseg.report.table import format_spread

    found = train_seeds(seeds, dataset, config, fold, **options)
    if not all(run.is_main for run in found.runs.values()):
        return
    values = {name: spread.values for name, spread in found.dice.items()}
    typer.echo(f"\nDice at full volume over {len(found.runs)} seeds:\n{format_spread(values)}")
    for seed, run in found.runs.items():
        typer.echo(f"Model of seed {seed}: {run.bundle}")
