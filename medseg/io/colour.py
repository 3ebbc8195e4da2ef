"""Colours, palettes and opacity of pictures, as channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.io.image import Stored

OPAQUE = 255
"""Opacity of a pixel that hides what is behind it, in 8 bits."""


def without_opacity(array: NDArray[Any], opaque: float, origin: str) -> NDArray[Any]:
    """Drop the last channel, which says how opaque each pixel is.

    Args:
        array: (..., C) grey or colours, then opacity.
        opaque: The largest opacity.
        origin: How messages call the file.

    Returns:
        (...) where one channel is left, else (..., C - 1).

    Raises:
        DatasetError: If a pixel is not opaque: its value would depend on what is behind it.
    """
    _check_opaque(array[..., -1] != opaque, origin)
    return array[..., 0] if array.shape[-1] == 2 else array[..., :-1]


def in_colours(stored: Stored, origin: str) -> Stored:
    """Return a picture with a palette in its colours; anything else as it is.

    Args:
        stored: Values as stored; with a palette they are (I, J, K) indices of its entries.
        origin: How messages call the file.

    Raises:
        DatasetError: If a pixel has no entry in the palette, or one that is not opaque.
    """
    if stored.palette is None:
        return stored
    largest = int(stored.array.max())
    if largest >= len(stored.palette):
        raise DatasetError(
            f"{origin}: a pixel refers to entry {largest} of its palette, which has "
            f"{len(stored.palette)}. Save the picture again in colours."
        )
    _check_opaque((stored.palette[:, 3] != OPAQUE)[stored.array], origin)
    colours = stored.palette[stored.array, :3]
    return replace(stored, array=colours, fourth="colours", palette=None)


def one_channel(stored: Stored) -> Stored | None:
    """Return what colours hold as one value per voxel, or None where the channels differ.

    That is what becomes of a label map that a program saved in grey colours.

    Args:
        stored: (I, J, K, C).
    """
    if stored.array.ndim != 4 or not (stored.array == stored.array[..., :1]).all():
        return None
    return replace(stored, array=stored.array[..., 0])


def _check_opaque(see_through: NDArray[np.bool_], origin: str) -> None:
    count = int(np.count_nonzero(see_through))
    if count:
        raise DatasetError(
            f"{origin}: {count} of {see_through.size} pixels are not opaque, so their values "
            "depend on what is shown behind them; expected no transparency. Save the picture "
            "without its alpha channel."
        )
