"""Colours of figures and pages; those of structures are `medseg.io.palette`'s."""

from __future__ import annotations

from medseg.io.palette import COLOURS, colour

__all__ = ["COLOURS", "FAINT", "INK", "LINE_COLOURS", "colour"]

LINE_COLOURS = tuple(shade for shade in COLOURS if shade not in ("#F0E442", "#88CCEE", "#DDCC77"))
"""The colours that are dark enough for lines on white."""

INK = "#333333"
"""Text and axes."""
FAINT = "#9A9A9A"
"""What stays in the background."""
