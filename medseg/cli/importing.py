"""import nnunet, import totalsegmentator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli.options import names

imports = typer.Typer(
    help="Take over models of other programs; nothing in their files is run.", no_args_is_help=True
)

Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder for the bundle; not with --list.")
]
Listing = Annotated[bool, typer.Option("--list", help="Show what is there; import nothing.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(imports, name="import")


def _needed(output: Path | None) -> Path:
    if output is None:
        raise typer.BadParameter("is missing; expected a folder", param_hint="-o / --output")
    return output


@imports.command("nnunet")
def nnunet(  # noqa: PLR0913 - one option of the command each
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Folder of a model, tree of results, or zip.")
    ],
    output: Output = None,
    listing: Listing = False,
    task: Annotated[
        str | None, typer.Option("--task", help="Name or number, where there are several.")
    ] = None,
    configuration: Annotated[
        str | None, typer.Option("--configuration", help="Such as 3d_fullres, likewise.")
    ] = None,
    trainer: Annotated[
        str | None, typer.Option("--trainer", help="Class that trained it, likewise.")
    ] = None,
    plans: Annotated[
        str | None, typer.Option("--plans", help="Name of the plans, likewise.")
    ] = None,
    folds: Annotated[
        str | None, typer.Option("--folds", help="Folds to take, such as 0,1 or all.")
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option("--dataset-json", help="Version 1: names its labels and channels."),
    ] = None,
    label_resize: Annotated[
        str,
        typer.Option(
            "--label-resize", help="How label maps are resampled: argmax, or threshold as once."
        ),
    ] = "argmax",
) -> None:
    """Import a model of nnU-Net, version 1 or 2."""
    from medseg.api import importing
    from medseg.report.bundles import format_bundle
    from medseg.report.imports import format_found

    if listing:
        typer.echo(format_found(importing.list_nnunet(path), path))
        return
    bundle = importing.import_nnunet(
        path,
        _needed(output),
        task=task,
        configuration=configuration,
        trainer=trainer,
        plans=plans,
        folds=names(folds),
        dataset_json=dataset_json,
        label_resize=label_resize,  # type: ignore[arg-type]
    )
    typer.echo(format_bundle(bundle.folder, bundle.folder))


@imports.command("totalsegmentator")
def totalsegmentator(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of the weights, as that tool has it.")
    ],
    output: Output = None,
    listing: Listing = False,
    task: Annotated[
        str | None, typer.Option("--task", help="Such as total, where there are several.")
    ] = None,
) -> None:
    """Import a task of TotalSegmentator: its models, and the steps around them."""
    from medseg.api import importing
    from medseg.report.bundles import format_bundle
    from medseg.report.imports import format_tasks

    if listing:
        typer.echo(format_tasks(importing.list_totalsegmentator(folder), folder))
        return
    made = importing.import_totalsegmentator(folder, _needed(output), task=task)
    typer.echo(format_bundle(made.folder, made.folder))
