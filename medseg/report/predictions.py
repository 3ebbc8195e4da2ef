"""What became of predicted cases, as a table that fits a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from medseg.report.text import WIDTH, columns, shortened, wrap
from medseg.schema.prediction import PredictionRow

_MAX_ROWS = 40
_MAX_REASONS = 20
_LARGEST_NAME = 32
_LARGEST_TITLE = 16
"""Columns that names of cases and of structures may take."""
_GAP = "  "


def format_predictions(rows: Sequence[PredictionRow], width: int = WIDTH) -> str:
    """Return the volumes of the new segmentations, the counts, and each failure and flag.

    Args:
        rows: One per case.
        width: Columns of the terminal, at least 80; as many structures are shown as fit.
    """
    done = [row for row in rows if row.status == "done"]
    failed = [row for row in rows if row.status == "failed"]
    flagged = [row for row in rows if row.flags]
    blocks = [
        _volumes(done, width),
        [_counts(rows)],
        _reasons("failed", failed, lambda row: (row.message,)),
        _skipped(rows),
        _reasons("with flags", flagged, lambda row: row.flags),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _volumes(rows: Sequence[PredictionRow], width: int) -> list[str]:
    """Return one line per case: the first cases, and the structures that fit."""
    if not rows:
        return []
    shown = rows[:_MAX_ROWS]
    names = list(dict.fromkeys(name for row in rows for name in row.volumes_ml))
    table = [_column([row.case for row in shown], "case", _LARGEST_NAME)]
    table.append(_column([f"{row.seconds:.1f}" for row in shown], "seconds", to_the_right=True))
    for name in names:
        cells = _numbers([row.volumes_ml.get(name) for row in shown])
        column = _column(cells, shortened(name, _LARGEST_TITLE), to_the_right=True)
        if sum(columns(part[0]) + len(_GAP) for part in [*table, column]) - len(_GAP) > width:
            break
        table.append(column)
    lines = [_GAP.join(cells).rstrip() for cells in zip(*table, strict=True)]
    rule = "-" * max(columns(line) for line in lines)
    num_left = len(names) - (len(table) - 2)
    return [lines[0], rule, *lines[1:], *_left_out(len(rows) - len(shown), num_left)]


def _column(
    cells: Sequence[str], title: str, largest: int = 80, *, to_the_right: bool = False
) -> list[str]:
    """Return title and cells, all equally wide; what is wider than the largest is cut."""
    texts = [shortened(text, largest) for text in (title, *cells)]
    width = max(columns(text) for text in texts)
    spaces = [" " * (width - columns(text)) for text in texts]
    pairs = zip(spaces, texts, strict=True)
    return [space + text if to_the_right else text + space for space, text in pairs]


def _numbers(volumes: Sequence[float | None]) -> list[str]:
    """Return the volumes of one structure, all with as many digits as tell the largest."""
    largest = max((volume for volume in volumes if volume is not None), default=0.0)
    digits = 2 if largest >= 1 or largest == 0 else min(9, 2 - math.floor(math.log10(largest)))
    return ["-" if volume is None else f"{volume:.{digits}f}" for volume in volumes]


def _left_out(num_rows: int, num_names: int) -> list[str]:
    left = [
        f"{number} more {noun}{'s' if number > 1 else ''}"
        for number, noun in ((num_rows, "case"), (num_names, "structure"))
        if number
    ]
    return [f"volumes in ml; {' and '.join(left)} in summary.csv" if left else "volumes in ml"]


def _counts(rows: Sequence[PredictionRow]) -> str:
    """Return how many cases ended how; what did not happen is not mentioned."""
    numbers = [
        (sum(row.status == "done" for row in rows), "done"),
        (sum(row.status == "failed" for row in rows), "failed"),
        (sum(row.status == "skipped" for row in rows), "skipped"),
        (sum(bool(row.flags) for row in rows), "with flags"),
    ]
    told = [f"{number} {what}" for number, what in numbers if number or what == "done"]
    return ", ".join(told)


def _skipped(rows: Sequence[PredictionRow]) -> list[str]:
    """Return why cases were skipped, the same reason once, where it is not that all is done."""
    numbers = Counter(row.message for row in rows if row.status == "skipped")
    told = [
        f"{number} case{'s' if number > 1 else ''}: {message}"
        for message, number in numbers.items()
        if ";" in message
    ]
    lines = [line for text in told for line in wrap(text, indent="  ")]
    return ["skipped:", *lines] if lines else []


def _reasons(
    what: str, rows: Sequence[PredictionRow], texts: Callable[[PredictionRow], Sequence[str]]
) -> list[str]:
    """Return the cases of one kind with what is to be said of each."""
    if not rows:
        return []
    lines = [f"{what}:"]
    for row in rows[:_MAX_REASONS]:
        for text in texts(row):
            lines += wrap(f"{row.case}: {text}", indent="  ")
    if len(rows) > _MAX_REASONS:
        lines.append(f"  ... and {len(rows) - _MAX_REASONS} more in summary.csv")
    return lines
