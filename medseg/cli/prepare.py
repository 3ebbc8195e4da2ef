"""fingerprint, plan, preprocess, plan-and-preprocess."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from medseg.cli.options import (
    Configs,
    Dataset,
    FromBundle,
    GpuMemory,
    PlansName,
    Replan,
    SkipBad,
    TargetSpacing,
    Workers,
    numbers,
    settings,
)

if TYPE_CHECKING:
    from medseg.schema.plans import Plans

_SHOW, _DIFF = "show", "diff"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("fingerprint")(fingerprint)
    app.command("plan")(plan)
    app.command("preprocess")(preprocess)
    app.command("plan-and-preprocess")(plan_and_preprocess)


def fingerprint(dataset: Dataset, skip_bad: SkipBad = False, workers: Workers = None) -> None:
    """Check every case and measure the dataset."""
    from medseg.api import prepare

    result = prepare.fingerprint(
        dataset, skip_bad=skip_bad, workspace=settings.workspace, workers=workers, progress=True
    )
    typer.echo(f"{len(result.cases)} cases measured.")


def plan(  # noqa: PLR0913 - one option of the command each
    action: Dataset,
    dataset: str | None = typer.Argument(
        None,
        metavar="[DATASET]",
        show_default=False,
        help="After 'show' and 'diff'; also DATASET:PLANS, a plans file, a bundle or a run.",
    ),
    other: str | None = typer.Argument(
        None, metavar="[OTHER]", show_default=False, help="After 'diff': what to compare with."
    ),
    plans: PlansName = "nnunet",
    gpu_memory: GpuMemory = None,
    target_spacing: TargetSpacing = None,
    from_bundle: FromBundle = None,
    replan: Replan = False,
) -> None:
    """Plan: 'plan DATASET'; look at plans: 'plan show DATASET'; compare two: 'plan diff A B'."""
    from medseg.api import prepare
    from medseg.api.plan_files import find_plans

    if action == _DIFF and dataset is not None and other is not None:
        _diff(dataset, other)
        return
    if action == _SHOW and dataset is not None and other is None:
        _show(find_plans(dataset, plans=plans, workspace=settings.workspace))
        return
    if dataset is not None:
        raise typer.BadParameter(_misused(action, dataset, other))
    result = prepare.plan(
        action,
        plans=plans,
        gpu_memory=gpu_memory,
        target_spacing=numbers(target_spacing, "--target-spacing"),
        from_bundle=from_bundle,
        replan=replan,
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


def plan_and_preprocess(  # noqa: PLR0913 - one option each
    dataset: Dataset,
    configurations: Configs = None,
    plans: PlansName = "nnunet",
    gpu_memory: GpuMemory = None,
    target_spacing: TargetSpacing = None,
    from_bundle: FromBundle = None,
    replan: Replan = False,
    skip_bad: SkipBad = False,
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
        from_bundle=from_bundle,
        replan=replan,
        skip_bad=skip_bad,
        workspace=settings.workspace,
        workers=workers,
        progress=True,
    )
    _show(result)


def _misused(action: str, dataset: str, other: str | None) -> str:
    if action == _DIFF:
        return f"'plan diff' compares two, got {dataset!r} alone; 'plan diff {dataset} OTHER'"
    if other is None:
        return f"{dataset!r} is one too many; did you mean 'plan show {dataset}'?"
    return f"{other!r} is one too many; did you mean 'plan diff {dataset} {other}'?"


def _diff(first: str, second: str) -> None:
    from medseg.api.plan_files import compare_plans

    difference = compare_plans(first, second, workspace=settings.workspace)
    if difference:
        typer.echo(difference)
        raise typer.Exit(1)
    typer.echo("The plans are equal.")


def _show(plans: Plans) -> None:
    from medseg.report.plans import format_plans

    typer.echo(format_plans(plans))
