"""What the owner of a model of nnU-Net v2 found to help after the network.

The decision lies beside the model as a pickle that names functions, which is never opened, and as
JSON, which says the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from medseg.errors import BundleError
from medseg.interop.nnunet.v2_values import FileSchema, Text, Whole, checked, read_foreign_json
from medseg.schema.postprocessing import KeepLargest, Postprocessing

_FUNCTION = "remove_all_but_largest_component_from_segmentation"
_MOST_STEPS = 1000


class StepArguments(FileSchema):
    """What one step is given."""

    labels_or_regions: Whole | tuple[Whole | tuple[Whole, ...], ...]
    """Values whose union is one mask."""
    background_label: Whole = 0
    """Value of what is removed."""


class StepsFile(FileSchema):
    """`postprocessing.json`."""

    postprocessing_fns: tuple[Text, ...] = Field(max_length=_MOST_STEPS)
    """Name of each step's function."""
    postprocessing_kwargs: tuple[StepArguments, ...] = Field(max_length=_MOST_STEPS)
    """What each is given."""


def read_postprocessing(
    folder: Path, files: Sequence[str], folds: Collection[str], values: Collection[int]
) -> tuple[Postprocessing | None, tuple[str, ...]]:
    """Return the steps after the network, and what a user should know of them.

    Args:
        folder: Folder of the model.
        files: Files that say which, relative to it.
        folds: Those that are read; the file found with these counts, else that with most folds.
        values: Values a segmentation of the model may have.
    """
    name = _chosen(files, folds)
    if name is None:
        return None, ()
    problems: list[str] = []
    try:
        file = checked(StepsFile, read_foreign_json(folder / name), name, problems)
    except BundleError as error:
        file, problems = None, [str(error)]
    steps = _steps(file, name, set(values) - {0}, problems) if file is not None else ()
    if problems:
        return None, (f"The postprocessing was not taken over: {'; '.join(problems)}.",)
    if not steps:
        return None, ()
    notes = [
        f"{len(steps)} step{'s' if len(steps) > 1 else ''} of postprocessing from {name}: only the "
        "largest piece of a structure stays. nnU-Net itself applies it with a command of its own."
    ]
    if (others := _folds(name)) != set(folds):
        notes.append(f"It was found with the folds {', '.join(sorted(others))}.")
    return Postprocessing(reason=f"nnU-Net's {name}", steps=steps), (" ".join(notes),)


def _chosen(files: Sequence[str], folds: Collection[str]) -> str | None:
    candidates = sorted(name for name in files if name.endswith("/postprocessing.json"))
    return max(
        candidates,
        key=lambda name: (_folds(name) == set(folds), len(_folds(name))),
        default=None,
    )


def _folds(name: str) -> set[str]:
    """Return the folds in the name of a folder.

    >>> sorted(_folds("crossval_results_folds_0_1/postprocessing.json"))
    ['fold_0', 'fold_1']
    """
    return {f"fold_{number}" for number in re.findall(r"_(\d+)", name.split("/")[0])}


def _steps(
    file: StepsFile, name: str, values: set[int], problems: list[str]
) -> tuple[KeepLargest, ...]:
    functions, arguments = file.postprocessing_fns, file.postprocessing_kwargs
    if len(functions) != len(arguments):
        problems.append(
            f"{name}: has {len(functions)} functions, but arguments of {len(arguments)}"
        )
        return ()
    result = []
    for function, given in zip(functions, arguments, strict=True):
        wanted = _union(given.labels_or_regions)
        unknown = sorted(set(wanted) - values)
        if function != _FUNCTION or given.background_label != 0:
            problems.append(f"{name}: {function} is not known; expected {_FUNCTION}")
        elif unknown or not wanted:
            problems.append(f"{name}: labels_or_regions is {wanted}; expected values of labels")
        else:
            result.append(KeepLargest(structures=wanted, together=True, connectivity=3))
    return tuple(result)


def _union(entry: Any) -> tuple[int, ...]:
    """Return the values of labels and regions, each once."""
    if isinstance(entry, int):
        return (entry,)
    return tuple(dict.fromkeys(value for part in entry for value in _union(part)))
