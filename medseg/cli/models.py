"""models list, models info, models fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import settings

models = typer.Typer(help="Public models by name: list, download, import.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a model ('models list').")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(models, name="models")


@models.command("list")
def list_models(
    word: Annotated[
        str, typer.Argument(metavar="WORD", help="Show only models that have to do with it.")
    ] = "",
) -> None:
    """List the public models of the catalogue."""
    from medseg.api.catalogue import matching, read_catalogue
    from medseg.report.catalogue import format_models

    catalogue = read_catalogue()
    typer.echo(format_models(matching(word, catalogue), len(catalogue.models)))


@models.command("info")
def info(name: Name) -> None:
    """Show all that is known of a model, and what is not verified."""
    from medseg.api.catalogue import find_model, read_catalogue
    from medseg.report.catalogue import format_model

    typer.echo(format_model(find_model(name, read_catalogue())))


@models.command("fetch")
def fetch(
    name: Name,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the bundle. Default: the workspace's."),
    ] = None,
    mirror: Annotated[
        Path | None,
        typer.Option("--from", help="Folder with the archive; nothing is downloaded then."),
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option("--configuration", help="Which model, where the archive holds several."),
    ] = None,
) -> None:
    """Download a model, verify it and import it; the same command again goes on."""
    from medseg.api import catalogue
    from medseg.report.catalogue import format_note

    fetched = catalogue.fetch(
        name,
        output,
        mirror=mirror,
        configuration=configuration,
        workspace=settings.workspace,
        progress=True,
    )
    checked = fetched.entry.checksum.partition(":")[0]
    words = f"its {checked} is as published" if checked else "no published checksum to compare with"
    typer.echo(f"archive  {fetched.archive}\nsha256   {fetched.sha256}\n         {words}")
    if note := format_note(fetched.entry):
        typer.echo(note)
    model = fetched.bundle if output is not None else name
    typer.echo(f"Predict with 'predict -m {model}'.")
