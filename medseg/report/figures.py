"""The picture of a training run's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medseg.report.canvas import new_figure, save_png
from medseg.report.overlay import overlay_figure
from medseg.report.palette import FAINT, INK, LINE_COLOURS

__all__ = ["overlay_figure", "progress_figure"]

EMA_DECAY = 0.9
"""Weight of the past in the smoothed mean Dice."""
_MAX_NAMED = 8
_BLUE, _RED = "#0072B2", "#D55E00"

Rows = Sequence[Mapping[str, Any]]
Values = NDArray[np.float64]


def progress_figure(rows: Rows, path: Path) -> None:
    """Draw loss, patch Dice, learning rate and time of every epoch.

    Args:
        rows: Rows of `journal.jsonl`; values that are missing or None leave gaps.
        path: PNG file to write.
    """
    figure = new_figure(10, 7)
    axes = figure.subplots(2, 2, width_ratios=(1, 1), height_ratios=(1.5, 1), sharex=True)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.94, bottom=0.08, hspace=0.24, wspace=0.15)
    epochs = _column(rows, "epoch") + 1
    _draw_loss(axes[0, 0], epochs, rows)
    _draw_dice(axes[0, 1], epochs, rows)
    _draw_lr(axes[1, 0], epochs, rows)
    _draw_seconds(axes[1, 1], epochs, rows)
    for one in axes.flat:
        _style(one)
    last = max(epochs.max(initial=1), 2)
    margin = 0.02 * (last - 1)
    for one in axes[1]:
        one.set_xlabel("epoch", color=INK)
        one.set_xlim(1 - margin, last + margin)
        one.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else np.nan


def _draw_loss(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("loss")
    _line(axes, epochs, _column(rows, "train_loss"), color=_BLUE, label="training")
    _line(axes, epochs, _column(rows, "validation_loss"), color=_RED, label="validation")
    axes.legend(loc="upper right", frameon=False)


def _draw_dice(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("Dice of validation patches")
    names = list(dict.fromkeys(name for row in rows for name in row.get("patch_dice") or {}))
    for index, name in enumerate(names):
        values = [_number((row.get("patch_dice") or {}).get(name)) for row in rows]
        is_named = len(names) <= _MAX_NAMED
        _line(
            axes,
            epochs,
            np.array(values),
            color=LINE_COLOURS[index] if is_named else FAINT,
            linewidth=1.1 if is_named else 0.6,
            label=name if is_named else ("each structure" if index == 0 else "_"),
        )
    mean = _column(rows, "mean_patch_dice")
    _line(axes, epochs, mean, color=INK, linewidth=0.8, linestyle=":", label="mean")
    _line(axes, epochs, smoothed(mean), color=INK, linewidth=2.2, label="mean, smoothed")
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="best", frameon=False, ncols=2 if len(names) > 3 else 1)


def _draw_lr(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("learning rate")
    _line(axes, epochs, _column(rows, "lr"), color=_BLUE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_seconds(axes: Axes, epochs: Values, rows: Rows) -> None:
    axes.set_title("seconds per epoch")
    _line(axes, epochs, _column(rows, "seconds"), color=_BLUE, label="in all")
    waiting = _column(rows, "wait_seconds")
    if np.isfinite(waiting).any():
        _line(axes, epochs, waiting, color=_RED, label="waiting for data")
        axes.legend(loc="best", frameon=False)
    axes.set_ylim(bottom=0)


def _line(axes: Axes, epochs: Values, values: Values, **style: Any) -> None:
    """Draw a line, with dots where there are so few points that a line could be missed."""
    few = np.isfinite(values).sum() < 3
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
