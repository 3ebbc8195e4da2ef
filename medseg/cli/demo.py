"""demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Device


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("demo")(demo)


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for everything the demo makes.")
    ] = Path("medseg_demo"),
    device: Device = "auto",
) -> None:
    """Simulate brain images, train two folds, predict held-out cases, score and draw them."""
    from medseg.api.demo import run_demo
    from medseg.report.table import format_metrics

    result = run_demo(output, device=device, progress=True)
    typer.echo(f"\nHeld-out cases, ensemble of two folds:\n{format_metrics(result.metrics)}")
    typer.echo(f"\nPictures: {result.pictures[0].parent}\nModel: {result.bundle}")
    typer.echo(f"Whole demo: {result.seconds / 60:.1f} minutes.")
