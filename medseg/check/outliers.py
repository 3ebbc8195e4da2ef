"""The few values that stand apart from all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

H = TypeVar("H", bound=Hashable)

FEWEST = 8
"""Numbers of fewer cases say nothing about what is ordinary."""
_FEWEST_KINDS = 5
_MAJORITY = 0.8
_FEW = 0.05
_SIGMAS = 6.0
_MAD_TO_SIGMA = 1.4826


def apart(values: Sequence[float], least: float) -> list[int]:
    """Return the places of the few values that a wide gap parts from all others.

    Several scanners make several crowds of values, which is no reason to look at a case: only
    crowds of at most a twentieth of the cases, or one case, are reported.

    Args:
        values: One per case.
        least: A gap that is never wide. A wide one also exceeds six standard deviations, as the
            median absolute deviation tells them.

    Examples:
        >>> apart([1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, 9.0], least=0.5)
        [7]
        >>> apart([1.0, 1.1, 0.9, 1.0, 9.2, 9.0, 8.8, 9.0], least=0.5)
        []
    """
    if len(values) < FEWEST:
        return []
    found = np.asarray(values, dtype=np.float64)
    spread = float(np.median(np.abs(found - np.median(found))))
    order = np.argsort(found, kind="stable")
    wide = np.diff(found[order]) > max(least, _SIGMAS * _MAD_TO_SIGMA * spread)
    crowds = np.split(order, np.flatnonzero(wide) + 1)
    few = max(1, int(_FEW * len(values)))
    places = [int(place) for crowd in crowds if len(crowd) <= few for place in crowd]
    return sorted(places) if len(places) <= 2 * few else []


def minority(kinds: Mapping[str, H]) -> tuple[H, list[str]] | None:
    """Return the kind of a clear majority and the cases that are not of it.

    Args:
        kinds: Case id -> kind.

    Returns:
        None without five cases, without a majority of 80 %, or where all are of one kind.

    Examples:
        >>> minority({"a": "RAS", "b": "RAS", "c": "LPS", "d": "RAS", "e": "RAS"})
        ('RAS', ['c'])
    """
    if len(kinds) < _FEWEST_KINDS:
        return None
    kind, number = Counter(kinds.values()).most_common(1)[0]
    if number < _MAJORITY * len(kinds) or number == len(kinds):
        return None
    return kind, [case for case, other in kinds.items() if other != kind]
