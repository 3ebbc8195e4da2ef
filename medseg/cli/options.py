"""Options that several commands share, and what the top command hands down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(slots=True)
class Settings:
    """Values of the options before the command's name."""

    workspace: Path = Path("medseg_work")
    debug: bool = False


settings = Settings()
"""Filled by the top command of this process."""

Dataset = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="Raw data (a folder or a manifest), or a name or number."
    ),
]
Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Configuration of the plans, such as 3d_fullres.")
]
Configs = Annotated[
    list[str] | None,
    typer.Option("-c", "--configuration", help="Configuration; repeat it. Default: all."),
]
PlansName = Annotated[str, typer.Option("--plans", help="Name of the plans.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", help="Recipe: a name ('medseg config list') or a YAML file.")
]
RunName = Annotated[
    str | None, typer.Option("--name", help="Name of the run. Default: the recipe's.")
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes. Default: all processors.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda:N or mps.")]
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", help="Memory that training may take, such as 16GB."),
]
TargetSpacing = Annotated[
    str | None,
    typer.Option(
        "--target-spacing", help="Spacing in mm instead of the planned one: I,J,K of RAS axes."
    ),
]
FromBundle = Annotated[
    str | None,
    typer.Option("--from", help="Model, or plans file, whose plans are taken over."),
]
Replan = Annotated[
    bool, typer.Option("--replan", help="Replace plans that are there; the default keeps them.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out cases with errors, on record in check.json.")
]


def names(text: str | None) -> list[str] | None:
    """Return "a, b" as a list of names; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",")]


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Return "1,1,2.5" as numbers.

    Raises:
        typer.BadParameter: If it is not a comma-separated list of numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}; expected numbers such as 1,1,2.5", param_hint=option
        ) from None
