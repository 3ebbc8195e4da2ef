"""config list, config copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

config = typer.Typer(help="List recipes, or copy one to change it.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(config, name="config")


@config.command("list")
def list_recipes() -> None:
    """List the recipes that come with medseg."""
    from medseg.api.recipes import read_recipe, recipe_paths

    for name in recipe_paths():
        typer.echo(f"{name:<12} {read_recipe(name).description}")


@config.command("copy")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe to copy.")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="New YAML file.")],
) -> None:
    """Copy a recipe to a file of one's own."""
    from medseg.api.recipes import copy_recipe

    typer.echo(f"Edit {copy_recipe(name, target)} and give it to 'train --recipe'.")
