"""Colours of structures, the same in files, tables and pictures."""

from __future__ import annotations

import functools
import itertools

import numpy as np

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
"""Okabe and Ito's palette without black, then colours of Paul Tol's "muted" and "light" sets:
people with any kind of colour vision can tell them apart."""

_LEVELS = tuple(range(20, 249, 28))
"""Of red, green and blue of further colours."""
_BRIGHTNESS = (60, 225)
"""What stays visible on black and on white."""


def colour(index: int) -> str:
    """Return the colour of the index-th structure as #RRGGBB.

    The first ones are `COLOURS`; each further one is as far as possible from all before. After some
    hundreds they repeat.

    Examples:
        >>> colour(0), colour(14)
        ('#E69F00', '#4C14F4')
    """
    if index < len(COLOURS):
        return COLOURS[index]
    return _further()[(index - len(COLOURS)) % len(_further())]


@functools.cache
def _further() -> tuple[str, ...]:
    """Return a grid of colours, ordered so that each is as far as possible from all before it."""
    grid = np.array(list(itertools.product(_LEVELS, repeat=3)), dtype=np.int64)
    brightness = grid @ (0.299, 0.587, 0.114)
    grid = grid[(brightness > _BRIGHTNESS[0]) & (brightness < _BRIGHTNESS[1])]
    known = np.array([rgb(shade) for shade in COLOURS])
    distances = ((grid[:, np.newaxis] - known) ** 2).sum(axis=-1).min(axis=1)
    chosen = []
    for _ in range(len(grid)):
        best = int(distances.argmax())
        chosen.append("#" + "".join(f"{part:02X}" for part in grid[best].tolist()))
        distances = np.minimum(distances, ((grid - grid[best]) ** 2).sum(axis=1))
    return tuple(chosen)


def rgb(shade: str) -> tuple[int, int, int]:
    """Return red, green and blue of #RRGGBB.

    Examples:
        >>> rgb("#E69F00")
        (230, 159, 0)
    """
    return int(shade[1:3], 16), int(shade[3:5], 16), int(shade[5:7], 16)
