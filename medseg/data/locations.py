"""Voxels of each label that patches are centred on, drawn once for each case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.lesions import Lesions
from medseg.values import distinct_values, value_counts

ANNOTATED = -1
"""Key of the locations without the ignore label, in datasets that have one."""

_PART = 1 << 20
"""Voxels of a label map looked at together."""
_MIN_LOCATIONS = 10_000
_MIN_SHARE = 0.01
_SEED = 1234
_PARTS, _FURTHER, _TOUCHING = "parts", "further", "touching"
"""What the arrays of a file are called that say which voxels are connected."""

Labels = NDArray[np.unsignedinteger[Any]]


def sample_locations(
    segmentation: Labels, ignore_label: int | None = None
) -> dict[int, NDArray[np.int32]]:
    """Return up to max(10,000, 1 %) voxels of each foreground label, drawn without replacement.

    With an ignore label, `ANNOTATED` holds as many voxels that do not have it.

    Source:
        Class locations of nnU-Net v2's preprocessor.
    """
    rng = np.random.default_rng(_SEED)
    flat = segmentation.ravel()
    values, counts = value_counts(flat)
    found = {
        int(v): int(n) for v, n in zip(values, counts, strict=True) if v not in (0, ignore_label)
    }
    chosen = {label: _ranks(number, rng) for label, number in found.items()}
    if ignore_label is not None:
        num_ignored = int(counts[values == ignore_label].sum())
        chosen[ANNOTATED] = _ranks(flat.size - num_ignored, rng)
    voxels = {label: [np.empty(0, np.intp)] for label in chosen}
    seen = dict.fromkeys(chosen, 0)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        for label in _occurring(part, chosen):
            held = part != ignore_label if label == ANNOTATED else part == label
            where = np.flatnonzero(held)
            first, seen[label] = seen[label], seen[label] + len(where)
            ranks = chosen[label]
            wanted = ranks[np.searchsorted(ranks, first) : np.searchsorted(ranks, seen[label])]
            voxels[label].append(start + where[wanted - first])
    return {
        label: np.stack(np.unravel_index(np.concatenate(parts), segmentation.shape), axis=1).astype(
            np.int32
        )
        for label, parts in voxels.items()
    }


def _ranks(count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return which of a label's voxels are sampled, ascending."""
    sampled = min(count, max(_MIN_LOCATIONS, math.ceil(count * _MIN_SHARE)))
    return np.sort(rng.choice(count, sampled, replace=False)).astype(np.intp)


def _occurring(part: Labels, chosen: Mapping[int, Any]) -> list[int]:
    """Return the labels of `chosen` that occur in a part of a label map."""
    occurring = set(distinct_values(part).tolist()) if part.any() else {0}
    return [label for label in chosen if label == ANNOTATED or label in occurring]


def write_locations(
    path: Path,
    locations: Mapping[int, NDArray[np.int32]],
    lesions: Lesions,
    shape: tuple[int, ...],
) -> None:
    """Write voxels as their flat index: a third of the space."""
    kind = np.uint32 if math.prod(shape) <= np.iinfo(np.uint32).max else np.uint64

    def flat(voxels: NDArray[np.int32]) -> NDArray[Any]:
        found: NDArray[Any] = np.ravel_multi_index(tuple(voxels.T), shape).astype(kind)
        return found

    arrays: dict[str, Any] = {str(label): flat(voxels) for label, voxels in locations.items()}
    for label, parts in lesions.parts.items():
        arrays[f"{_PARTS} {label}"] = parts
        arrays[f"{_FURTHER} {label}"] = flat(lesions.further[label])
    arrays[_TOUCHING] = lesions.touching
    np.savez(path, **arrays)


def read_locations(
    path: Path, shape: tuple[int, ...]
) -> tuple[dict[int, NDArray[np.int32]], Lesions]:
    """Return the voxels of each label, and the connected parts they lie in."""

    def voxels(flat: NDArray[Any]) -> NDArray[np.int32]:
        return np.stack(np.unravel_index(flat.astype(np.intp), shape), axis=1).astype(np.int32)

    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    touching = held.pop(_TOUCHING)
    groups: dict[str, dict[int, Any]] = {"": {}, _PARTS: {}, _FURTHER: {}}
    for name, array in held.items():
        kind, _, label = name.rpartition(" ")
        groups[kind][int(label)] = array if kind == _PARTS else voxels(array)
    lesions = Lesions(parts=groups[_PARTS], further=groups[_FURTHER], touching=touching)
    return groups[""], lesions
