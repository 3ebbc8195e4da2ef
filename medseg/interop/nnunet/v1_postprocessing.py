"""Read what the owner of a model of nnU-Net v1 chose to do after the network."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg.errors import BundleError
from medseg.interop.nnunet.v1_values import number_of, problem_lines, whole_number
from medseg.interop.nnunet.v2_values import shown
from medseg.schema.postprocessing import KeepLargest, Postprocessing

FILE = "postprocessing.json"
_MAX_BYTES = 2**24
_LONGEST_SIZES = 10_000


def read_postprocessing(path: Path, num_labels: int) -> tuple[Postprocessing | None, str | None]:
    """Return the steps, and a sentence on what was left out; nothing where there are no steps.

    Args:
        path: The file.
        num_labels: Labels of the model, without the background: 1 to this.

    Raises:
        BundleError: With every problem: it is not such a file, or a piece of it makes no sense.

    Source:
        `for_which_classes` and `min_valid_object_sizes` of nnU-Net 1.7.1, where of every structure
        the largest piece stays, and of the others those that reach the least size, in mm^3.
    """
    content = _content(path)
    if not isinstance(content, Mapping) or "for_which_classes" not in content:
        raise BundleError(f"{path}: for_which_classes is missing; expected a list of labels.")
    problems: list[str] = []
    entries = _entries(content["for_which_classes"], num_labels, problems)
    sizes = _sizes(content.get("min_valid_object_sizes"), problems)
    steps, unknown = [], set()
    for entry in entries:
        values = (entry,) if isinstance(entry, int) else entry
        known = tuple(dict.fromkeys(value for value in values if value <= num_labels))
        unknown |= set(values) - set(known)
        below = None if sizes is None else _size(sizes, entry, problems)
        if known and not (below is not None and below <= 0):
            limit = None if below is None or math.isinf(below) else below
            steps.append(KeepLargest(structures=known, connectivity=1, below_mm3=limit))
    if problems:
        raise BundleError(problem_lines(str(path), problems))
    note = None
    if unknown:
        listed = ", ".join(map(str, sorted(unknown)))
        note = f"Postprocessing of {listed} was left out, as the model has no such labels."
    reason = f"{FILE} of the imported model"
    return (Postprocessing(reason=reason, steps=tuple(steps)) if steps else None), note


def _content(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BundleError(f"{path}: far too large; expected the postprocessing of a model.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: not valid JSON ({str(error)[:100]}). Restore or delete the file."
        ) from None


def _entries(values: Any, num_labels: int, problems: list[str]) -> list[int | tuple[int, ...]]:
    """Return labels, and groups of labels that are one structure."""
    if values is None:  # every label that is there, one after the other
        return list(range(1, num_labels + 1))
    if not isinstance(values, list):
        problems.append(f"for_which_classes: got {shown(values)}; expected a list of labels")
        return []
    found: list[int | tuple[int, ...]] = []
    for number, value in enumerate(values):
        members = value if isinstance(value, list) else [value]
        whole = [member for item in members if (member := whole_number(item)) is not None]
        if not whole or len(whole) != len(members) or min(whole) < 1:
            problems.append(
                f"for_which_classes.{number}: got {shown(value)}; expected a label from 1, or a "
                "list of such"
            )
        else:
            found.append(tuple(whole) if isinstance(value, list) else whole[0])
    return found


def _sizes(value: Any, problems: list[str]) -> Mapping[Any, Any] | None:
    """Return the least size of each structure; None where there are none.

    They are a dictionary written as Python does, inside the JSON's text.
    """
    name = "min_valid_object_sizes"
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if len(value) <= _LONGEST_SIZES else value
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            problems.append(f"{name}: got {shown(value)}; expected None or sizes by labels")
            return None
    if value is None or isinstance(value, Mapping):
        return value
    problems.append(f"{name}: got {shown(value)}; expected None or sizes by labels")
    return None


def _size(
    sizes: Mapping[Any, Any], entry: int | tuple[int, ...], problems: list[str]
) -> float | None:
    """Return the least size of a structure in mm^3, having noted where there is none."""
    value = sizes.get(entry)
    if isinstance(value, float) and math.isinf(value):
        return value
    number = number_of(value)
    if number is None:
        problems.append(
            f"min_valid_object_sizes: got {shown(value)} for {entry}; expected a size in mm^3 for "
            "every entry of for_which_classes"
        )
    return number
