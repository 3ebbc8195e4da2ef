"""The picture of a training run's progress."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medseg.report.canvas import drawable, new_figure, save_png
from medseg.report.overlay import overlay_figure
from medseg.report.palette import FAINT, INK, LINE_COLOURS
from medseg.report.text import shortened

__all__ = ["overlay_figure", "progress_figure"]

EMA_DECAY = 0.9
"""Weight of the past in the smoothed mean Dice."""
_MAX_NAMED = 8
_LOWEST_NAMED = 3
"""Structures that are named where there are more than that."""
_MAX_LETTERS = 18
_FEW = 2
"""Points up to which a line could be missed."""
_MANY_EPOCHS = 150
_BLUE, _RED = "#0072B2", "#D55E00"
_PARTS = {
    "wait": ("waiting for data", _RED),
    "augment": ("augmentation", "#E69F00"),
    "forward": ("forward", "#56B4E9"),
    "backward": ("backward", _BLUE),
    "validate": ("validation", "#009E73"),
}
"""Parts of an epoch's time: row field without `_seconds`, its name and colour."""
_REST = "#CCCCCC"
_MOST_BARS = 60
"""Epochs up to which each has a bar of its own; more of them flow into each other."""
_MOST_MARKERS = 60
_MOST_MARKS = 40
"""Most interruptions that are marked, the last ones."""
_MOST_ALARM_LINES = 8
_LINE_LETTERS = 160
_WIDTH, _HEIGHT, _LINE_HEIGHT = 11.0, 7.0, 0.17
"""Inches."""

Rows = Sequence[Mapping[str, Any]]
Values = NDArray[np.float64]


def progress_figure(rows: Rows, path: Path) -> None:
    """Draw loss, Dice, learning rate and time of every epoch, interruptions and alarms.

    Args:
        rows: Rows of `journal.jsonl`; values that are missing or None leave gaps.
        path: PNG file to write.
    """
    notes = _notes(rows)
    below = _LINE_HEIGHT * len(notes) + (0.1 if notes else 0)
    height = _HEIGHT + below
    figure = new_figure(_WIDTH, height)
    axes = figure.subplots(2, 2, width_ratios=(1, 1.1), height_ratios=(1.5, 1), sharex=True)
    figure.subplots_adjust(
        left=0.06, right=0.825, top=1 - 0.4 / height, bottom=(0.55 + below) / height,
        hspace=0.26, wspace=0.15,
    )  # fmt: skip
    epochs = _column(rows, "epoch") + 1
    _draw_loss(axes[0, 0], epochs, rows)
    _draw_dice(axes[0, 1], epochs, rows)
    _draw_lr(axes[1, 0], epochs, rows)
    _draw_seconds(axes[1, 1], epochs, rows)
    for one in axes.flat:
        _mark(one, rows, with_alarms=one in axes[0])
        _style(one)
    last = max(epochs.max(initial=1), 2)
    margin = max(0.02 * (last - 1), 0.5 if len(rows) <= _MOST_BARS else 0)
    for one in axes[1]:
        one.set_xlabel("epoch", color=INK)
        one.set_xlim(1 - margin, last + margin)
        one.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for number, (text, colour) in enumerate(reversed(notes)):
        y = (0.1 + _LINE_HEIGHT * number) / height
        figure.text(0.012, y, text, fontsize=8.5, color=colour, va="bottom")
    save_png(figure, path)


def smoothed(values: Values, decay: float = EMA_DECAY) -> Values:
    """Return the exponential moving average; it starts at the first value and steps over NaN.

    Args:
        values: Shape (N,).
        decay: Weight of the past.

    Examples:
        >>> smoothed(np.array([1.0, 0.0, np.nan, 0.0])).round(3).tolist()
        [1.0, 0.9, 0.9, 0.81]
    """
    result = np.full(len(values), np.nan)
    current = np.nan
    for index, value in enumerate(values):
        if np.isnan(current):
            current = value
        elif not np.isnan(value):
            current = decay * current + (1 - decay) * value
        result[index] = current
    return result


def _column(rows: Rows, key: str) -> Values:
    return np.array([_number(row.get(key)) for row in rows], dtype=np.float64)


def _member(rows: Rows, key: str, name: str) -> Values:
    """Return the column of one structure."""
    return np.array([_number((row.get(key) or {}).get(name)) for row in rows], dtype=np.float64)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else np.nan


def _draw_loss(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("loss")
    losses = [_column(rows, "train_loss"), _column(rows, "validation_loss")]
    _line(axes, epochs, losses[0], color=_BLUE, label="training")
    if np.isfinite(losses[1]).any():
        _line(axes, epochs, losses[1], color=_RED, label="validation")
    axes.legend(loc="upper right", frameon=False)
    _keep_in_sight(axes, np.concatenate(losses))


def _keep_in_sight(axes: Axes, values: Values) -> None:
    """Leave single huge losses outside, which would press all others into a line."""
    values = values[np.isfinite(values)]
    if len(values) < 3:
        return
    low, high = np.quantile(values, [0.0, 0.9])
    limit = high + 2 * (high - low)
    if 0 < limit - low < values.max() - low:
        axes.set_ylim(low - 0.05 * (limit - low), limit)


def _draw_dice(axes: Axes, epochs: Values, rows: Rows) -> None:
    full = _column(rows, "mean_full_dice")
    has_full = bool(np.isfinite(full).any())
    axes.set_title("Dice of patches; diamonds: full volumes" if has_full else "Dice of patches")
    keys = ("patch_dice", "full_dice")
    names = list(dict.fromkeys(name for key in keys for row in rows for name in row.get(key) or {}))
    patch = {name: _member(rows, "patch_dice", name) for name in names}
    prefix = ""
    if len(names) > _MAX_NAMED:
        _band(axes, epochs, np.stack(list(patch.values())))
        names, prefix = _lowest(patch), "low: "
    for name, colour in zip(names, LINE_COLOURS, strict=False):
        _curve(axes, epochs, patch[name], color=colour, label=_label(f"{prefix}{name}"))
        _diamonds(axes, epochs, _member(rows, "full_dice", name), color=colour, markersize=4)
    mean = _column(rows, "mean_patch_dice")
    if len(patch) != 1:
        _line(axes, epochs, mean, color=INK, linewidth=0.8, linestyle=":", label="mean")
    if np.isfinite(mean).sum() > _FEW:
        _line(axes, epochs, smoothed(mean), color=INK, linewidth=2.2, label="mean, smoothed")
    _diamonds(axes, epochs, full, color=INK, markersize=6, label="mean, full volumes")
    _show_last(axes, epochs, full)
    if not has_full and not any(np.isfinite(values).any() for values in patch.values()):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=FAINT)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)


def _curve(axes: Axes, epochs: Values, values: Values, *, color: str, label: str) -> None:
    """Draw a structure's Dice; over many epochs smoothed, before what it was smoothed from."""
    if len(epochs) > _MANY_EPOCHS:
        _line(axes, epochs, values, color=color, linewidth=0.5, alpha=0.25, label="_")
        values = smoothed(values)
    _line(axes, epochs, values, color=color, linewidth=1.1, label=label)


def _band(axes: Axes, epochs: Values, values: Values) -> None:
    """Shade where the structures lie that are too many for a line each.

    Args:
        axes: Where to draw.
        epochs: (N,).
        values: (structures, N) Dice, NaN where unknown.
    """
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    ends = np.full((5, len(epochs)), np.nan)
    ends[:, known] = np.nanquantile(values[:, known], [0, 0.25, 0.5, 0.75, 1], axis=0)
    if known.sum() <= _FEW:
        axes.plot(epochs, values.T, ".", color=FAINT, markersize=3)
    axes.fill_between(epochs, ends[0], ends[4], color=FAINT, alpha=0.25, linewidth=0,
                      label=f"all {len(values)}")  # fmt: skip
    axes.fill_between(epochs, ends[1], ends[3], color=FAINT, alpha=0.6, linewidth=0,
                      label="middle half")  # fmt: skip


def _lowest(values: Mapping[str, Values]) -> list[str]:
    """Return the structures with the lowest Dice of late, the very lowest first."""
    late = {name: smoothed(column)[-1] for name, column in values.items() if len(column)}
    known = [name for name, value in late.items() if np.isfinite(value)]
    return sorted(known, key=late.__getitem__)[:_LOWEST_NAMED]


def _diamonds(axes: Axes, epochs: Values, values: Values, **style: Any) -> None:
    """Draw Dice at full volume, which is measured every few epochs."""
    known = np.isfinite(values)
    if known.any():
        few = known.sum() <= _MOST_MARKERS
        look = {"linewidth": 0.7, "marker": "D" if few else "", **style}
        axes.plot(
            epochs[known], values[known], markeredgecolor="white", markeredgewidth=0.6, **look
        )


def _show_last(axes: Axes, epochs: Values, values: Values) -> None:
    """Write the last known value beside its point."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known):
        x, y = epochs[known[-1]], values[known[-1]]
        axes.annotate(
            f"{y:.3f}", (x, y), (-3, -6), textcoords="offset points", ha="right", va="top",
            fontsize=9, color=INK, fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )  # fmt: skip


def _draw_lr(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("learning rate")
    _line(axes, epochs, _column(rows, "lr"), color=_BLUE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_seconds(axes: Axes, epochs: Values, rows: Rows) -> None:
    """Draw the seconds of each epoch, from the bottom up by what they went into."""
    axes.set_title("seconds per epoch")
    whole = _column(rows, "seconds")
    bottom = np.zeros(len(epochs))
    for part, (label, colour) in _PARTS.items():
        values = _column(rows, f"{part}_seconds")
        if np.isfinite(values).any():
            values = np.nan_to_num(values)
            label = f"{label} {_share(values, whole)}"
            _layer(axes, epochs, bottom, values, color=colour, label=label)
            bottom = bottom + values
    if bottom.any():
        rest = np.maximum(np.nan_to_num(whole) - bottom, 0)
        label = f"other {_share(rest, whole)}"
        _layer(axes, epochs, bottom, rest, color=_REST, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.06), frameon=False, reverse=True)
    else:
        _line(axes, epochs, whole, color=_BLUE)
    axes.set_ylim(bottom=0)


def _layer(axes: Axes, epochs: Values, bottom: Values, values: Values, **style: Any) -> None:
    if len(epochs) <= _MOST_BARS:
        axes.bar(epochs, values, bottom=bottom, width=0.9, **style)
    else:
        axes.fill_between(epochs, bottom, bottom + values, linewidth=0, step="mid", **style)


def _share(part: Values, whole: Values) -> str:
    """Return a part of the time of all epochs, in words short enough for a legend."""
    known = np.isfinite(whole)
    total = float(whole[known].sum())
    return f"{float(part[known].sum()) / total:.0%}" if total > 0 else ""


def _mark(axes: Axes, rows: Rows, *, with_alarms: bool) -> None:
    """Draw a line where another process went on, and a triangle at an alarm."""
    for epoch, is_extended in _joints(rows)[-_MOST_MARKS:]:
        style = "-" if is_extended else ":"
        axes.axvline(epoch + 0.5, color=FAINT, linewidth=1, zorder=0.5, linestyle=style)
    ringing = [row["epoch"] + 1 for row in rows if row.get("alarms")] if with_alarms else []
    if ringing:
        at = axes.get_xaxis_transform()
        axes.plot(ringing, [0.012] * len(ringing), "^", color=_RED, markersize=6, transform=at)


def _joints(rows: Rows) -> list[tuple[float, bool]]:
    """Return (epoch after which another process went on, whether the run was extended there)."""
    found = []
    for before, row in pairwise(rows):
        is_extended = (row.get("progress") or 0) < (before.get("progress") or 0)
        if is_extended or row.get("session", 0) != before.get("session", 0):
            found.append((_number(row.get("epoch")), is_extended))
    return found


def _notes(rows: Rows) -> list[tuple[str, str]]:
    """Return the lines below the curves and their colours: what marks mean, then the alarms."""
    joints = _joints(rows)
    kinds = [
        (sum(1 for _, extended in joints if not extended), "dotted: went on in another process"),
        (sum(1 for _, extended in joints if extended), "line: extended beyond its first length"),
    ]
    told = [f"{text}{f' ({count} times)' if count > 1 else ''}" for count, text in kinds if count]
    notes = [("; ".join(told), INK)] if told else []
    alarms = [alarm for row in rows for alarm in row.get("alarms") or ()]
    lines = [
        f"{'  ' if index else ''}{line}"
        for alarm in alarms
        for index, line in enumerate(textwrap.wrap(drawable(alarm), _LINE_LETTERS))
    ]
    hidden = len(lines) - _MOST_ALARM_LINES
    if hidden > 0:
        lines = ["(earlier alarms stand in journal.jsonl)", *lines[hidden + 1 :]]
    return notes + [(line, _RED) for line in lines]


def _label(name: str) -> str:
    """Return a structure's name for a legend, which leaves out names that begin with "_"."""
    text = drawable(shortened(name, _MAX_LETTERS))
    return f" {text}" if text.startswith("_") else text


def _line(axes: Axes, epochs: Values, values: Values, **style: Any) -> None:
    """Draw a line, with dots where there are so few points that a line could be missed."""
    few = np.isfinite(values).sum() <= _FEW
    axes.plot(epochs, values, **{"linewidth": 1.4, "marker": "o" if few else "", **style})


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.title.set(fontsize=11, color=INK, fontweight="bold")
    axes.tick_params(labelsize=9, labelbottom=True, colors=INK)
    legend = axes.get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set(fontsize=9, color=INK)
