"""Maps of real numbers on the image's grid, handed on slab by slab.

Shape letters: L logit channels, I J K axes of the image as stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.geometry import SpatialRecord
from medseg.labels import LabelScheme


class Maps(Protocol):
    """Takes maps of real numbers on the image's grid, a slab at a time."""

    @property
    def kinds(self) -> frozenset[str]:
        """Return which are wanted: "probabilities", "entropy", "disagreement"."""

    def put(self, kind: str, index: tuple[slice, slice, slice], values: NDArray[Any]) -> None:
        """Take a slab, float32: (L, I, J, K) of probabilities, (I, J, K) of the others."""


class ArrayMaps:
    """Maps in memory."""

    def __init__(self, kinds: frozenset[str], shape: tuple[int, int, int], num_logits: int) -> None:
        """Make room for maps of an image (I, J, K)."""
        self.kinds = kinds
        shapes = {kind: (num_logits, *shape) if kind == "probabilities" else shape
                  for kind in kinds}  # fmt: skip
        self.arrays = {kind: np.zeros(size, dtype=np.float32) for kind, size in shapes.items()}

    def put(self, kind: str, index: tuple[slice, slice, slice], values: NDArray[Any]) -> None:
        """Take a slab."""
        self.arrays[kind][(..., *index)] = values


NO_MAPS = ArrayMaps(frozenset(), (1, 1, 1), 1)


def put_slab(
    maps: Maps,
    made: Mapping[str, torch.Tensor | None],
    rows: slice,
    axis: int,
    record: SpatialRecord,
    labels: LabelScheme,
) -> None:
    """Hand the maps of a slab on, on the image's axes, with what lies outside the box.

    Args:
        maps: What takes them.
        made: Kind -> values (..., *slab) of the box in network order; nothing where all the slab
            is outside of it.
        rows: Rows of the oriented image along `axis`.
        axis: Network axis that is cut.
        record: How the network sees the image.
        labels: What the channels mean.
    """
    for kind in sorted(maps.kinds):
        whole = _nothing(kind, rows, axis, record, labels)
        values = made.get(kind)
        if values is not None:
            part: Any = (..., *within(record, axis, slice(0, rows.stop - rows.start)))
            whole[part] = values.cpu().numpy()
        maps.put(kind, _image_rows(record, axis, rows), _on_image_axes(whole, record))


def within(record: SpatialRecord, axis: int, rows: slice) -> tuple[slice, ...]:
    """Return the index of a slab of the box within the oriented image."""
    return tuple(rows if d == axis else slice(*limits) for d, limits in enumerate(record.box))


def _nothing(
    kind: str, rows: slice, axis: int, record: SpatialRecord, labels: LabelScheme
) -> NDArray[np.float32]:
    """Return what a map holds where there is nothing but background, in network order."""
    shape = list(record.shape_oriented)
    shape[axis] = rows.stop - rows.start
    if kind != "probabilities":
        return np.zeros(shape, dtype=np.float32)
    whole = np.zeros((labels.num_logits, *shape), dtype=np.float32)
    if not labels.has_regions:
        whole[0] = 1
    return whole


def _on_image_axes(array: NDArray[np.float32], record: SpatialRecord) -> NDArray[np.float32]:
    """Return a view of a slab (..., network order) with the image's order and directions."""
    lead = array.ndim - 3
    steps: Any = (..., *(slice(None, None, -1 if flip else 1) for flip in record.flips))
    order = (*range(lead), *(lead + record.axes.index(axis) for axis in range(3)))
    view: NDArray[np.float32] = array[steps].transpose(order)
    return view


def _image_rows(record: SpatialRecord, axis: int, rows: slice) -> tuple[slice, slice, slice]:
    """Return where rows of the oriented image lie in the image as stored."""
    own, length = record.axes[axis], record.shape_oriented[axis]
    if record.flips[axis]:
        rows = slice(length - rows.stop, length - rows.start)
    a, b, c = (rows if image_axis == own else slice(None) for image_axis in range(3))
    return a, b, c


def entropy(probabilities: torch.Tensor, labels: LabelScheme) -> torch.Tensor:
    """Return how undecided probabilities are: 0 certain, 1 all alike; of regions the mean.

    Args:
        probabilities: (L, *spatial).
        labels: Whether the channels exclude each other.
    """
    if labels.has_regions:
        others = 1 - probabilities
        both: torch.Tensor = torch.special.entr(probabilities) + torch.special.entr(others)
        return both.mean(dim=0) / math.log(2)
    single: torch.Tensor = torch.special.entr(probabilities).sum(dim=0)
    return single / math.log(len(probabilities))
