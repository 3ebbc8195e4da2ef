"""Scores as plain text, at most 80 columns wide."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from medseg.report.text import WIDTH, columns, shortened, wrap
from medseg.schema.metrics import CaseMetrics, Metrics, StructureMetrics, StructureSummary

_STRUCTURE_WIDTHS = (20, 5, 17, 7, 9, 7, 7, 8)
_WORST_WIDTHS = (32, 10, 2, 20, 7, 9)
_SPREAD_WIDTHS = (20, 3, 8, 8, 8, 8, 25)


def format_metrics(metrics: Metrics, *, num_worst: int = 5) -> str:
    """Return a table of the structures, the worst cases, and what could not be evaluated.

    Args:
        metrics: Scores of a set of cases.
        num_worst: Number of cases listed by name; 0 leaves the list out.
    """
    blocks = [
        _structures(metrics),
        _worst(metrics, num_worst),
        _failed(metrics),
        [line for note in metrics.notes for line in wrap(f"note: {note}")],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def format_spread(values: Mapping[str, Sequence[float]]) -> str:
    """Return a table of scores over several runs: each value, their mean and spread.

    Args:
        values: Structure -> score of each run.
    """
    names = ("structure", "n", "mean", "std", "min", "max", "  each")
    lines = [_row(names, _SPREAD_WIDTHS, left=(0, 6)), "-" * WIDTH]
    for name, found in values.items():
        each = " ".join(f"{value:.4f}" for value in found)
        if not found:
            cells = ["-"] * 4
        else:
            spread = statistics.stdev(found) if len(found) > 1 else None
            numbers = (statistics.fmean(found), spread, min(found), max(found))
            cells = [_number(value, 4) for value in numbers]
        row = (name, str(len(found)), *cells, f"  {each}")
        lines.append(_row(row, _SPREAD_WIDTHS, left=(0, 6)))
    return "\n".join(lines)


def _structures(metrics: Metrics) -> list[str]:
    names = ("structure", "n", "Dice mean +- std", "min", "HD95 mm", "NSD", "prec.", "recall")
    mean = metrics.foreground_mean
    values = (mean.hd95_mm, mean.nsd, mean.precision, mean.recall)
    last = ("mean", str(len(metrics.cases)), _with_std(mean.dice, None), "", *_values(values))
    rule = "-" * WIDTH
    return [
        _row(names, _STRUCTURE_WIDTHS),
        rule,
        *(_structure(name, summary) for name, summary in metrics.summary.items()),
        rule,
        _row(last, _STRUCTURE_WIDTHS),
        *wrap(
            "n: cases with the structure; HD95: both surfaces present; "
            f"NSD: within {metrics.nsd_tolerance_mm:g} mm"
        ),
    ]


def _structure(name: str, summary: StructureSummary) -> str:
    dice = summary.dice
    others = (summary.hd95_mm, summary.nsd, summary.precision, summary.recall)
    cells = (
        name,
        str(dice.n),
        _with_std(dice.mean, dice.std),
        _number(dice.min, 3),
        *_values(tuple(one.mean for one in others)),
    )
    return _row(cells, _STRUCTURE_WIDTHS)


def _worst(metrics: Metrics, num_worst: int) -> list[str]:
    """List the cases of lowest mean Dice, each with its lowest structure."""
    ranked = [
        (statistics.fmean(found), case)
        for case, one in metrics.cases.items()
        if (found := [s.dice for s in one.structures.values() if s.dice is not None])
    ]
    shown = sorted(ranked)[:num_worst]
    if not shown or len(metrics.cases) == 1:
        return []
    names = ("lowest cases", "mean Dice", "", "lowest structure", "Dice", "HD95 mm")
    lines = [_row(names, _WORST_WIDTHS, left=(0, 3)), "-" * WIDTH]
    for mean, case in shown:
        structure, values = _lowest(metrics.cases[case])
        cells = (
            case,
            _number(mean, 3),
            "",
            structure,
            _number(values.dice, 3),
            _number(values.hd95_mm, 2),
        )
        lines.append(_row(cells, _WORST_WIDTHS, left=(0, 3)))
    return lines


def _lowest(case: CaseMetrics) -> tuple[str, StructureMetrics]:
    defined = [(name, one) for name, one in case.structures.items() if one.dice is not None]
    return min(defined, key=lambda item: item[1].dice or 0.0)


def _failed(metrics: Metrics) -> list[str]:
    if not metrics.failed:
        return []
    total = len(metrics.failed) + len(metrics.cases)
    lines = [f"{len(metrics.failed)} of {total} cases could not be evaluated:"]
    for case, reason in metrics.failed.items():
        lines += wrap(f"{case}: {reason}", indent="  ")
    return lines


def _values(values: tuple[float | None, ...]) -> tuple[str, ...]:
    """Return cells for the distance in mm and the shares behind it."""
    return (_number(values[0], 2), *(_number(value, 3) for value in values[1:]))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_std(mean: float | None, std: float | None) -> str:
    spread = "         " if std is None else f" +- {std:.3f}"
    return "-" + " " * 9 if mean is None else f"{mean:.3f}{spread}"


def _row(cells: Sequence[str], widths: tuple[int, ...], left: tuple[int, ...] = (0,)) -> str:
    """Return one line: names (cut to fit) to the left of their columns, numbers to the right."""
    padded = []
    for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        text = shortened(cell, width - 1) if index in left else cell
        space = " " * (width - columns(text))
        padded.append(text + space if index in left else space + text)
    return "".join(padded).rstrip()
