"""Matplotlib figures without its global state: drawn by Agg, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from medseg.schema.base import write_bytes

DPI = 150
"""Dots per inch of every picture."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def drawable(text: str) -> str:
    """Return a text as matplotlib can draw it: no formulas, "?" for what its font lacks.

    Examples:
        >>> drawable("\\u8111 $x$")
        '? \\\\$x\\\\$'
    """
    font = get_font(findfont("DejaVu Sans"))
    known = (letter if font.get_char_index(ord(letter)) else "?" for letter in text)
    return "".join(known).replace("$", r"\$")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(Path(path), buffer.getvalue())
