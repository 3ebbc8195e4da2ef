"""The connected parts of the labels of a case.

A label map is taken as runs: stretches of one label along the last axis. Runs in neighbouring rows
that overlap, or touch at a corner, are connected.

Source:
    Run-based labelling: L. He, Y. Chao, K. Suzuki, "A run-based two-scan labeling algorithm",
    IEEE Transactions on Image Processing 17(5), 2008; here the second scan is a graph's components.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_SLAB = 1 << 21
"""Voxels of a label map whose runs are connected together."""

Labels = NDArray[np.unsignedinteger[Any]]
Numbers = NDArray[np.integer[Any]]
Voxels = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesions:
    """The connected parts of each label of a case; voxels that touch at a corner are connected."""

    parts: Mapping[int, Numbers]
    """Label -> (N + E,) part of each of its locations, then of each further voxel."""
    further: Mapping[int, Voxels]
    """Label -> (E, 3) one voxel of each part that none of the locations lies in."""
    touching: Numbers
    """(P, 2) parts of different labels that touch."""
    _known: dict[tuple[int, ...], list[Voxels]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def of(self, labels: tuple[int, ...], locations: Mapping[int, Voxels]) -> list[Voxels]:
        """Return voxels of each connected part of a structure, (N, 3) each, in a fixed order.

        Parts of two labels of the structure that touch are one part of it.

        Args:
            labels: Labels of the structure.
            locations: Label -> (N, 3) sampled voxels.
        """
        if labels not in self._known:
            present = [label for label in labels if label in self.parts]
            self._known[labels] = self._grouped(present, locations) if present else []
        return self._known[labels]

    def _grouped(self, labels: list[int], locations: Mapping[int, Voxels]) -> list[Voxels]:
        pieces = [piece for label in labels for piece in (locations[label], self.further[label])]
        voxels = np.concatenate(pieces)
        numbers = np.concatenate([self.parts[label] for label in labels])
        known, places = np.unique(numbers, return_inverse=True)
        inside = self.touching[np.isin(self.touching, known).all(axis=1)]
        groups = _components(len(known), np.searchsorted(known, inside))[places]
        order = np.argsort(groups, kind="stable")
        return np.split(voxels[order], np.flatnonzero(np.diff(groups[order])) + 1)


def find_lesions(
    segmentation: Labels, labels: Iterable[int], locations: Mapping[int, Voxels]
) -> Lesions:
    """Return the connected parts of labels; takes memory for each run, not for each voxel.

    Args:
        segmentation: (I, J, K).
        labels: Labels whose parts are sought.
        locations: Label -> (N, 3) voxels.
    """
    wanted, shape = sorted(labels), segmentation.shape
    runs, parts, touching = _connected(segmentation, wanted)
    first, length, label_of_run = runs.T
    count = int(parts.max(initial=-1)) + 1
    found, is_missing = {}, np.ones(count, dtype=bool)
    for label in wanted:
        flat = np.ravel_multi_index(tuple(locations[label].T), shape)
        found[label] = parts[np.searchsorted(first, flat, side="right") - 1]
        is_missing[found[label]] = False
    missing = np.flatnonzero(is_missing)
    order = np.argsort(parts, kind="stable")
    ends = np.searchsorted(parts, [missing, missing + 1], sorter=order)
    middle = order[ends.sum(axis=0) // 2]  # the run in the middle of each missing part
    voxels = np.unravel_index(first[middle] + length[middle] // 2, shape)
    further = np.stack(voxels, axis=1).astype(np.int32)
    kind = np.min_scalar_type(max(0, count - 1))
    own = {label: label_of_run[middle] == label for label in wanted}
    return Lesions(
        parts={
            label: np.concatenate([numbers, missing[own[label]]]).astype(kind)
            for label, numbers in found.items()
        },
        further={label: further[own[label]] for label in wanted},
        touching=touching.astype(kind),
    )


def _connected(segmentation: Labels, wanted: list[int]) -> tuple[Numbers, Numbers, Numbers]:
    """Return the runs of a label map, the part of each, and the pairs of parts that touch.

    Slabs overlap by a plane; a run there has a provisional part in both, which are joined last.
    """
    plane = segmentation[0].size
    planes = max(1, _SLAB // max(1, plane))
    runs, parts, joined, touching = [], [], [], []
    count = 0
    before: Numbers = np.empty(0, dtype=np.intp)
    for start in range(0, len(segmentation), planes):
        origin = max(0, start - 1)
        slab = segmentation[origin : start + planes]
        found = _runs(slab, wanted)
        same, different = _neighbours(found, slab.shape)
        numbers = count + _components(len(found), same)
        count, seen = int(numbers.max(initial=count - 1)) + 1, len(before)
        joined.append(np.stack([before, numbers[:seen]], axis=1))
        touching.append(_distinct(numbers[different]))
        found[:, 0] += origin * plane
        runs.append(found[seen:])
        parts.append(numbers[seen:])
        before = numbers[np.searchsorted(found[:, 0], (origin + len(slab) - 1) * plane) :]
    final = _components(count, np.concatenate(joined))
    pairs = _distinct(final[np.concatenate(touching)])
    return np.concatenate(runs), final[np.concatenate(parts)], pairs


def _distinct(pairs: Numbers) -> Numbers:
    """Return the distinct pairs, whichever comes first in them; numbers are below 2 ** 31.

    Examples:
        >>> _distinct(np.array([[3, 1], [0, 2], [1, 3]])).tolist()
        [[0, 2], [1, 3]]
    """
    low, high = np.minimum(*pairs.T), np.maximum(*pairs.T)
    keys = np.unique(low << 32 | high)
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)


def _runs(slab: Labels, wanted: list[int]) -> Numbers:
    """Return (R, 3) for each run of a wanted label: flat index of its first voxel, length, label.

    Examples:
        >>> _runs(np.array([[[0, 5, 5], [5, 7, 0]]], dtype=np.uint8), [5, 7]).tolist()
        [[1, 2, 5], [3, 1, 5], [4, 1, 7]]
    """
    flat = slab.reshape(-1)
    begins = np.ones(flat.size + 1, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:-1])
    begins[:: slab.shape[-1]] = True
    ends = np.flatnonzero(begins)
    label = flat[ends[:-1]].astype(np.int64)
    runs = np.stack([ends[:-1], np.diff(ends), label], axis=1)
    kept: Numbers = runs[np.isin(label, wanted)]
    return kept


def _neighbours(runs: Numbers, shape: tuple[int, ...]) -> tuple[Numbers, Numbers]:
    """Return (P, 2) pairs of runs that touch: those of the same label, and the others."""
    _, width, length = shape
    row, start = np.divmod(runs[:, 0], length)
    stop = start + runs[:, 1]
    space = length + 2  # a row's keys lie apart from those of the next
    starts, stops = row * space + start, row * space + stop
    place = row % width
    beside = np.flatnonzero(starts[1:] == stops[:-1])
    pairs = [np.stack([beside, beside + 1], axis=1)]
    for shift, reaches in (
        (1, place + 1 < width),
        (width - 1, place > 0),
        (width, place >= 0),
        (width + 1, place + 1 < width),
    ):
        own = np.flatnonzero(reaches)
        low = np.searchsorted(stops, starts[own] + shift * space)
        high = np.searchsorted(starts, stops[own] + shift * space, side="right")
        counts = high - low
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs.append(np.stack([np.repeat(own, counts), np.repeat(low, counts) + within], axis=1))
    both = np.concatenate(pairs)
    is_same = runs[both[:, 0], 2] == runs[both[:, 1], 2]
    return both[is_same], both[~is_same]


def _components(count: int, pairs: Numbers) -> Numbers:
    """Return the component of each of `count` nodes, numbered by their first nodes.

    Args:
        count: Number of nodes.
        pairs: (P, 2) nodes that are connected.

    Examples:
        >>> _components(5, np.array([[1, 4], [3, 0]])).tolist()
        [0, 1, 2, 0, 1]
    """
    if not len(pairs):
        return np.arange(count)
    graph = coo_array((np.ones(len(pairs), dtype=bool), pairs.T), shape=(count, count))
    _, found = connected_components(graph, directed=False)
    _, first, places = np.unique(found, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), dtype=np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return ranks[places]
