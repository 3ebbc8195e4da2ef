"""train."""

from __future__ import annotations

import time
from typing import Annotated

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
    device: Device = "auto",
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Judge the weights that are there.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what this fold has.")
    ] = False,
) -> None:
    """Train a fold; the same command again goes on where it stopped."""
    from medseg.api.training import train as train_folds
    from medseg.report.table import format_metrics

    run = train_folds(
        dataset,
        config,
        fold,
        plans=plans,
        recipe=recipe,
        set=changes,
        name=name,
        budget=budget,
        epochs=epochs,
        iterations=iterations,
        seed=seed,
        device=device,
        validate_only=validate_only,
        restart=restart,
        workspace=settings.workspace,
        progress=True,
        started=_STARTED,
    )
    for fold_name, metrics in run.metrics.items():
        typer.echo(f"\n{fold_name}, full volumes:\n{format_metrics(metrics)}")
    typer.echo(f"\nModel: {run.bundle}")
