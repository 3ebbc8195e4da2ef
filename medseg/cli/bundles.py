"""bundle pack, bundle unpack, bundle info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import numbers, settings

bundle = typer.Typer(help="Share a model as one file, and see what it is.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(bundle, name="bundle")


@bundle.command("pack")
def pack(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Bundle, run, zip, model of nnU-Net, or name.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zip archive.")],
) -> None:
    """Write a bundle as one verified zip archive."""
    from medseg.api import packing
    from medseg.execute.sizes import size_words

    archive = packing.pack(model, output, workspace=settings.workspace)
    typer.echo(f"{archive}: {size_words(archive.stat().st_size)}, read back and verified.")


@bundle.command("unpack")
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="Zip archive of a bundle.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the bundle.")],
) -> None:
    """Unpack a bundle and verify it."""
    from medseg.api import packing

    folder = packing.unpack(archive, output)
    typer.echo(f"{folder}: verified. Predict with 'predict -m {folder}'.")


@bundle.command("join")
def join(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="Models whose probabilities are averaged; several."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the bundle.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="Share of each model, such as 2,1.")
    ] = None,
) -> None:
    """Make one bundle of several models: an ensemble."""
    from medseg.api import packing
    from medseg.report.bundles import format_bundle

    folder = packing.join(
        models, output, weights=numbers(weights, "--weights"), workspace=settings.workspace
    )
    typer.echo(format_bundle(folder, folder))


@bundle.command("info")
def info(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Bundle, run, zip, model of nnU-Net, or name.")
    ],
) -> None:
    """Show what a bundle is."""
    from medseg.api import packing
    from medseg.report.bundles import format_bundle

    with packing.opened_bundle(model, settings.workspace) as folder:
        typer.echo(format_bundle(folder, model))
