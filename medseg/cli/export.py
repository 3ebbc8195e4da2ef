"""export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import names, settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("export")(export)


def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Bundle, run, zip, model of nnU-Net, or name.")
    ],
    format: Annotated[str, typer.Option("--format", help="Format: onnx or nnunet.")],  # noqa: A002
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the export.")],
    folds: Annotated[
        str | None, typer.Option("--folds", help="Folds to export, such as 0,1. Default: all.")
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="final or best.")] = "final",
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run a network that the model brings as code.")
    ] = False,
) -> None:
    """Write a trained model in a format that other programs run."""
    from medseg.api import export as exporting
    from medseg.report.exports import format_export

    written = exporting.export(
        model,
        output,
        format=format,
        folds=names(folds),
        checkpoint=checkpoint,
        trust_code=trust_code,
        workspace=settings.workspace,
    )
    typer.echo(format_export(written, output))
