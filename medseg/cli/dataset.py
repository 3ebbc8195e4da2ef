"""dataset init, dataset check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import Dataset, Workers, settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Describe a dataset, or look for its problems.", no_args_is_help=True)
    group.command("init")(init)
    group.command("check")(check)
    app.add_typer(group, name="dataset")


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of images and segmentations.")
    ],
    images: Annotated[
        str | None,
        typer.Option("--images", help="Which files are images, such as 'sub-*/anat/*_T1w.nii.gz'."),
    ] = None,
    segmentations: Annotated[
        str | None,
        typer.Option("--segmentations", help="Which files are segmentations; a pattern likewise."),
    ] = None,
) -> None:
    """Look at a folder and write the manifest medseg.json of what was found."""
    from medseg.api import layouts
    from medseg.report.layout import format_found

    found = layouts.look_at(
        folder,
        images=images,
        segmentations=segmentations,
        workspace=settings.workspace,
        progress=True,
    )
    typer.echo(format_found(found))
    path = layouts.write_found(found, workspace=settings.workspace)
    typer.echo(layouts.next_step(found, path))


def check(
    dataset: Dataset,
    fix: Annotated[
        Path | None,
        typer.Option("--fix", help="New folder for a copy with everything safe corrected."),
    ] = None,
    workers: Workers = None,
) -> int:
    """Look for every problem of every case; write check.json and the page check.html."""
    from medseg.api import checking
    from medseg.report.check import format_check, format_fixed, num_errors

    report, page, corrected = checking.check_with_page(
        dataset, fix=fix, workspace=settings.workspace, workers=workers, progress=True
    )
    typer.echo(format_check(report))
    typer.echo(f"\nPictures of all cases: {page}")
    if fix is not None:
        typer.echo(format_fixed(report, str(fix), corrected))
    return 1 if num_errors(report) else 0
