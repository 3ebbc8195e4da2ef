"""What differs between two plans, side by side, in words, for a terminal."""

from __future__ import annotations

from itertools import zip_longest

from medseg.report.plans import configuration_rows, num_columns, plan_rows, wrapped
from medseg.schema.plans import Plans

_LABEL = 16
_COLUMN = 31
_ABSENT = "-"
Rows = dict[str, str]


def format_difference(first: Plans, second: Plans, names: tuple[str, str]) -> str:
    """Return the differing rows of two plans; an empty text where they are equal.

    Names of plans and data sets, what was asked for, the reasons, and which configuration inherits
    from which are not compared: none of them changes a training.

    Args:
        first: Plans of the left column.
        second: Plans of the right column.
        names: How the columns are called.
    """
    shown, exact = ([_sections(first, digits), _sections(second, digits)] for digits in (4, None))
    found: dict[str, list[str]] = {}
    for title in dict.fromkeys((*shown[0], *shown[1])):
        lines = _compared(*(side.get(title) for side in (*shown, *exact)))
        parent = first.inherits.get(title)
        if lines and parent == second.inherits.get(title) and lines == found.get(parent or ""):
            lines = [f"  as {parent}"]
        if lines:
            found[title] = lines
    if not found:
        return ""
    blocks = [[title, *lines] if title else lines for title, lines in found.items()]
    return "\n\n".join("\n".join(block) for block in (_row("", *names), *blocks))


def _sections(plans: Plans, digits: int | None) -> dict[str, Rows]:
    """Return title -> rows: what is shared under no title, then each configuration."""
    return {
        "": plan_rows(plans, digits),
        **{
            name: configuration_rows(entry, plans.left_right, digits)
            for name, entry in plans.configurations.items()
        },
    }


def _compared(
    left: Rows | None, right: Rows | None, exact_left: Rows | None, exact_right: Rows | None
) -> list[str]:
    """Return the lines of one section; a configuration one side lacks takes one line."""
    if left is None or right is None:
        words = ("only here" if side is not None else "not there" for side in (left, right))
        return _row("", *words)
    exact_left, exact_right = exact_left or {}, exact_right or {}
    lines = []
    for label in dict.fromkeys((*left, *right)):
        if exact_left.get(label) == exact_right.get(label):
            continue
        pair = left.get(label, _ABSENT), right.get(label, _ABSENT)
        if pair[0] == pair[1]:
            pair = exact_left[label], exact_right[label]
        lines += _row(label, *pair)
    return lines


def _row(label: str, left: str, right: str) -> list[str]:
    """Return a row of three columns, each wrapped."""
    columns = [wrapped(text, _COLUMN) for text in (left, right)]
    lines = zip_longest([f"  {label}"], *columns, fillvalue="")
    return [f"{a:<{_LABEL}}{_padded(b)} {c}".rstrip() for a, b, c in lines]


def _padded(text: str) -> str:
    return text + " " * (_COLUMN - num_columns(text))
