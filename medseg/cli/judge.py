"""evaluate, crossval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Config, Dataset, PlansName, RecipeName, RunName, settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("evaluate")(evaluate)
    app.command("crossval")(crossval)


def evaluate(
    pred: Annotated[Path, typer.Argument(metavar="PRED", help="Label map, or a folder of them.")],
    ref: Annotated[Path, typer.Argument(metavar="REF", help="Reference, or a folder of them.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file for the scores.")
    ] = None,
) -> int:
    """Score predictions against references."""
    from medseg.api import judging
    from medseg.report.table import format_metrics

    metrics = judging.evaluate(pred, ref, output=output)
    typer.echo(format_metrics(metrics))
    return 1 if metrics.failed else 0


def crossval(
    dataset: Dataset,
    config: Config,
    plans: PlansName = "nnunet",
    recipe: RecipeName = "default",
    name: RunName = None,
) -> int:
    """Pool the full-volume validation of all folds."""
    from medseg.api import judging
    from medseg.report.table import format_metrics

    metrics = judging.crossval(
        dataset, config, plans=plans, recipe=recipe, name=name, workspace=settings.workspace
    )
    typer.echo(format_metrics(metrics))
    return 1 if metrics.failed else 0
