"""What a run is, fixed at its start: recipe, plans, labels; length and seed of each fold."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from medseg.api.recipes import format_recipe
from medseg.data.splits import SPLIT_FILE, Split
from medseg.errors import ConfigError
from medseg.schema.base import FORMAT_VERSION, Schema, format_json, read, write_json, write_text
from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import Plans
from medseg.schema.recipe import Recipe

_ADVICE = "Give the new run a name of its own with --name, or delete the folder."
_MAX_LISTED = 10


_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class Stretch(Schema):
    """How long a fold is trained with one schedule."""

    planned_iterations: int | None
    """Length in optimiser steps; None with a budget."""
    budget_seconds: float | None
    """Length in seconds; None with a number of steps."""
    first_iteration: int = 0
    """Optimiser steps done before it."""


class FoldRecord(Schema):
    """`run.json` of a fold: what was settled at its start and, once it is trained, what came."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    seed: int
    """The seed asked for, or 0."""
    is_seeded: bool = False
    """Whether a seed was asked for; results are then to be had again on an accelerator, too."""
    stretches: tuple[Stretch, ...] = Field(min_length=1)
    """Its first schedule, and one more for each time it was extended."""
    device: str
    """Where it was trained."""
    precision: str
    """Arithmetic of the network."""
    threads: int
    """Threads of the network's operations on the CPU."""
    compiled: bool | None = None
    """Whether the network is compiled; None until that was tried."""
    processes: int = 1
    """Processes that each had a share of every batch."""
    init_from: str | None = None
    """Bundle whose weights the network started from."""
    validate_every: int | None = None
    """Epochs between two validations at full volume."""
    iterations: int | None = None
    """Optimiser steps done, once trained."""
    epochs: int | None = None
    """Epochs done, once trained."""
    seconds_to_last_step: float | None = None
    """Time from the start of the command to the last step of the last stretch, once trained."""
    skipped_steps: int | None = None
    """Steps whose loss or gradient was not finite, once trained."""
    best_patch_dice: float | None = None
    """Largest smoothed patch Dice, once trained."""
    best_full_dice: float | None = None
    """Largest mean Dice of the validations at full volume, once trained."""

    @property
    def stretch(self) -> Stretch:
        """Return the present schedule."""
        return self.stretches[-1]

    @property
    def is_trained(self) -> bool:
        """Return whether the present schedule has come to its end."""
        return self.iterations is not None

    @property
    def precision_name(self) -> str:
        """Return the arithmetic as a recipe spells it."""
        return _PRECISIONS[self.precision]


def check_run(path: Path, recipe: Recipe, plans: Plans, spec: DatasetSpec) -> None:
    """Check that a run which is there was started with this recipe, these plans and labels.

    Raises:
        ConfigError: With what differs.
    """
    for name, text in _claims(recipe, plans, spec).items():
        file = path / name
        if file.is_file() and (before := file.read_text(encoding="utf-8")) != text:
            raise ConfigError(
                "\n".join(
                    [
                        f"{path}: this run was started with another {name}:",
                        *_differences(before.splitlines(), text.splitlines()),
                        _ADVICE,
                    ]
                )
            )


def claim_run(path: Path, recipe: Recipe, plans: Plans, spec: DatasetSpec) -> None:
    """Write what a new run is; a run that is there keeps its own."""
    for name, text in _claims(recipe, plans, spec).items():
        if not (path / name).is_file():
            write_text(path / name, text)
    if not (path / "environment.json").is_file():
        write_json(path / "environment.json", _environment())


def read_record(fold_path: Path) -> FoldRecord | None:
    """Return what was settled when a fold was started; None if it was not."""
    path = fold_path / "run.json"
    return read(FoldRecord, path) if path.is_file() else None


def read_split(fold_path: Path) -> Split | None:
    """Return the cases a fold was started with; None if it was not."""
    path = fold_path / SPLIT_FILE
    return read(Split, path) if path.is_file() else None


def check_record(fold_path: Path, record: FoldRecord, **asked: Any) -> None:
    """Check that what is asked for now is what a started fold was started with.

    Args:
        fold_path: The fold's folder.
        record: What it was started with.
        **asked: Field of `FoldRecord` or of its present stretch -> value; None asks for nothing.

    Raises:
        ConfigError: With what differs.
    """
    settled = record.model_dump() | record.stretch.model_dump()
    problems = [
        f"  {name.replace('_', ' ')}: was {settled[name]}, now {value}"
        for name, value in asked.items()
        if value is not None and value != settled[name]
    ]
    if problems:
        raise ConfigError(
            "\n".join(
                [
                    f"{fold_path}: this fold was started otherwise:",
                    *problems,
                    "Leave these options out to go on with it, use --restart, or give the new run "
                    "a --name. A finished fold is trained on with --extend.",
                ]
            )
        )


def _claims(recipe: Recipe, plans: Plans, spec: DatasetSpec) -> dict[str, str]:
    """Return file name -> content of everything that all folds of a run share."""
    bare = spec.model_copy(update={"cases": {}, "source": "", "description": ""})
    return {
        "recipe.yaml": format_recipe(recipe),
        "plans.json": format_json(plans.model_dump(mode="json")) + "\n",
        "dataset.json": format_json(bare.model_dump(mode="json")) + "\n",
    }


def _differences(old: list[str], new: list[str]) -> list[str]:
    if len(old) != len(new):
        return ["  the two list different fields"]
    pairs = [(a.strip(), b.strip()) for a, b in zip(old, new, strict=True) if a != b]
    return [f"  was {a[:120]}, now {b[:120]}" for a, b in pairs[:_MAX_LISTED]]


def _environment() -> dict[str, str]:
    packages = ("medseg", "torch", "numpy", "scipy", "nibabel", "SimpleITK", "blosc2")
    versions = {package: metadata.version(package) for package in packages}
    return {"python": platform.python_version(), "platform": platform.platform(), **versions}
