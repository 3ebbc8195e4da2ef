"""Colours that people with any kind of colour vision can tell apart."""

from __future__ import annotations

COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#D55E00",
    "#CC79A7",
    "#0072B2",
    "#AA4499",
    "#88CCEE",
    "#DDCC77",
    "#44AA99",
    "#882255",
    "#999933",
    "#EE8866",
)
"""Okabe and Ito's palette without black, then colours of Paul Tol's "muted" and "light" sets."""

LINE_COLOURS = tuple(shade for shade in COLOURS if shade not in ("#F0E442", "#88CCEE", "#DDCC77"))
"""The colours that are dark enough for lines on white."""

INK = "#333333"
"""Text and axes."""
FAINT = "#9A9A9A"
"""What stays in the background."""


def colour(index: int) -> str:
    """Return the colour of the index-th structure; colours repeat after the last one.

    Examples:
        >>> colour(0), colour(len(COLOURS))
        ('#E69F00', '#E69F00')
    """
    return COLOURS[index % len(COLOURS)]
