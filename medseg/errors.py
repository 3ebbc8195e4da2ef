"""The exception tree: every error a user can cause and fix, and how a case's name is attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MedsegError(Exception):
    """Base of every error a user can cause and fix."""


class ConfigError(MedsegError, ValueError):
    """A value or a combination of values in a recipe, a plans file or a command is wrong."""


class DatasetError(MedsegError, ValueError):
    """The user's files are missing, unreadable or inconsistent."""


class GeometryError(DatasetError):
    """Grids that should agree do not."""


class PlanError(MedsegError, ValueError):
    """No plan fits the constraints, or a plan does not hold what was asked for."""


class BundleError(MedsegError, ValueError):
    """Weights or bundles are missing, damaged or incompatible."""


@contextmanager
def case_context(case_id: str) -> Iterator[None]:
    """Attach the case id to any medseg error raised inside the block."""
    try:
        yield
    except MedsegError as error:
        note = f"case: {case_id}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def near_names(name: str, known: list[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or an empty string.

    Examples:
        >>> near_names("dice_cee", ["ce", "dice", "dice_ce"])
        " Did you mean 'dice_ce'?"
    """
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
