"""fingerprint, plan, preprocess, plan-and-preprocess."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from medseg.cli.options import (
    Configs,
    Dataset,
    GpuMemory,
    PlansName,
    TargetSpacing,
    Workers,
    numbers,
    settings,
)

if TYPE_CHECKING:
    from medseg.schema.plans import Plans

_SHOW = "show"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("fingerprint")(fingerprint)
    app.command("plan")(plan)
    app.command("preprocess")(preprocess)
    app.command("plan-and-preprocess")(plan_and_preprocess)


def fingerprint(dataset: Dataset, workers: Workers = None) -> None:
    """Check every case and measure the dataset."""
    from medseg.api import prepare

    result = prepare.fingerprint(
        dataset, workspace=settings.workspace, workers=workers, progress=True
    )
    typer.echo(f"{len(result.cases)} cases measured.")


def plan(
    action: Dataset,
    dataset: str | None = typer.Argument(
        None, metavar="[DATASET]", show_default=False, help="After 'show'."
    ),
    plans: PlansName = "nnunet",
    gpu_memory: GpuMemory = None,
    target_spacing: TargetSpacing = None,
) -> None:
    """Plan from the fingerprint: 'plan DATASET'; show plans: 'plan show DATASET'."""
    from medseg.api import prepare

    if action == _SHOW and dataset is not None:
        _show(prepare.read_plans(dataset, plans=plans, workspace=settings.workspace))
        return
    if dataset is not None:
        raise typer.BadParameter(
            f"{dataset!r} is one too many; did you mean 'plan show {dataset}'?"
        )
    result = prepare.plan(
        action,
        plans=plans,
        gpu_memory=gpu_memory,
        target_spacing=numbers(target_spacing, "--target-spacing"),
        workspace=settings.workspace,
    )
    _show(result)


def preprocess(
    dataset: Dataset,
    configurations: Configs = None,
    plans: PlansName = "nnunet",
    workers: Workers = None,
) -> None:
    """Bring every case into the network's frame; finished cases are kept."""
    from medseg.api import prepare

    counts = prepare.preprocess(
        dataset,
        configurations=configurations,
        plans=plans,
        workspace=settings.workspace,
        workers=workers,
        progress=True,
    )
    typer.echo("\n".join(f"{name}: {count} cases ready." for name, count in counts.items()))


def plan_and_preprocess(
    dataset: Dataset,
    configurations: Configs = None,
    plans: PlansName = "nnunet",
    gpu_memory: GpuMemory = None,
    target_spacing: TargetSpacing = None,
    workers: Workers = None,
) -> None:
    """Check, fingerprint, plan and preprocess a dataset."""
    from medseg.api import prepare

    result = prepare.plan_and_preprocess(
        dataset,
        configurations=configurations,
        plans=plans,
        gpu_memory=gpu_memory,
        target_spacing=numbers(target_spacing, "--target-spacing"),
        workspace=settings.workspace,
        workers=workers,
        progress=True,
    )
    _show(result)


def _show(plans: Plans) -> None:
    from medseg.report.plans import format_plans

    typer.echo(format_plans(plans))
