"""Take values out of foreign files, trusting none of them, and gather what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medseg.interop.nnunet.v2_values import shown

_EXACT = 2**53


def problem_lines(origin: str, problems: Sequence[str]) -> str:
    """Return the text of an error with one line per problem."""
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    lines = [f"{count} in {origin}:", *(f"  {problem}" for problem in problems)]
    return "\n".join([*lines, "Copy the model's files again, or ask its owner for whole ones."])


class Reader:
    """Takes values out of plans and gathers what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def refuse(self, where: str, value: Any, expected: str) -> None:
        """Note that something is not what was expected."""
        self.problems.append(f"{where}: got {shown(value)}; expected {expected}")

    def mapping(self, value: Any, where: str) -> Mapping[Any, Any]:
        """Return a mapping, or an empty one after noting that it is none, or holds nothing."""
        if isinstance(value, Mapping) and value:
            return value
        self.refuse(where, value, "names with values")
        return {}

    def count(self, value: Any, where: str, most: int) -> int:
        """Return a number of things, or 1 after noting that it is none."""
        number = number_of(value)
        if number is not None and number.is_integer() and 1 <= number <= most:
            return int(number)
        self.refuse(where, value, f"a whole number from 1 to {most}")
        return 1

    def numbers(
        self,
        value: Any,
        where: str,
        low: float,
        high: float,
        *,
        lengths: Sequence[int],
        whole: bool = False,
    ) -> tuple[float, ...]:
        """Return a list of numbers, or an empty one after noting what is wrong with it."""
        found = [number_of(entry) for entry in items_of(value) or ()]
        fits = len(found) in lengths and all(
            entry is not None and low <= entry <= high and (not whole or entry.is_integer())
            for entry in found
        )
        if fits:
            return tuple(entry for entry in found if entry is not None)
        many = " or ".join(map(str, lengths))
        kind = "whole numbers" if whole else "numbers"
        self.refuse(where, value, f"{many} {kind} from {low:g} to {high:g}")
        return ()


def items_of(value: Any) -> list[Any] | None:
    """Return the entries of a list, a tuple or a flat array; None for anything else."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim == 1 else None
    return list(value) if isinstance(value, (list, tuple)) else None


def number_of(value: Any) -> float | None:
    """Return a finite number that a float holds exactly enough; None for anything else."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and abs(value) > _EXACT:
        return None
    return float(value) if math.isfinite(value) else None


def whole_number(value: Any) -> int | None:
    """Return an integer that is stored as one, a Python or a NumPy one; None for all else."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def entry_of(values: Mapping[Any, Any], number: int) -> Any:
    """Return the entry of a channel or a stage, whose key may have become text."""
    return values.get(number, values.get(str(number)))
