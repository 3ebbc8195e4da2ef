"""Which patch is the k-th one, and how it is cut. Depends on (seed, k) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.data.locations import ANNOTATED
from medseg.data.store import Entry
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec

Structure = tuple[int, ...]
"""Indices of a label or region."""

_STREAM_PATCHES = 1
"""Second word of the Philox key; other random streams of a run use other words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One training patch on the host."""

    image: NDArray[np.float32]
    """(C, *read)."""
    segmentation: NDArray[np.unsignedinteger[Any]]
    """(*read)."""
    outside: NDArray[np.bool_] | None
    """(*read) or None."""
    case_id: str
    index: int
    """The patch's number k in the run."""
    annotated: tuple[bool, ...] | None = None
    """Whether the structure of each logit channel was annotated in the case; None: all were."""
    previous: NDArray[np.integer[Any]] | None = None
    """(*read) label indices that the stage before found; None outside cascades."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What was annotated in a case that is not annotated completely."""

    channels: tuple[bool, ...]
    """Whether the structure of each logit channel was."""
    structures: tuple[Structure, ...]
    """Indices of each structure that was."""


def partial_annotations(spec: DatasetSpec, labels: LabelScheme) -> dict[str, Annotation]:
    """Return case id -> what was annotated, for the cases in which something was not."""
    found = {}
    for case, files in spec.cases.items():
        channels = labels.structure_mask(files.annotated_labels)
        if not all(channels):
            sought = labels.sought(files.annotated_labels)
            found[case] = Annotation(channels=channels, structures=sought)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSampler:
    """Draws patch k: a case, a place, and the voxels there.

    More than the patch is read where its augmentation needs more, around the same centre.
    Positions follow the patch: placed at random, it touches the image's border but does not leave
    it, unless the image is smaller; around a voxel it may leave the far border.

    Source:
        Data loader of nnU-Net v2.
    """

    entries: Mapping[str, Entry]
    case_ids: tuple[str, ...]
    patch_size: tuple[int, ...]
    """Size after augmentation in voxels, 2 or 3 entries."""
    read_size: Callable[[int], tuple[int, ...]] | None = None
    """Size to cut for patch k: `patch_size` plus even margins. None: `patch_size`."""
    batch_size: int
    foreground_fraction: float
    """Share of each batch, its last samples, centred on a foreground voxel."""
    structures: Sequence[Structure]
    """Indices of each foreground structure (label or region)."""
    seed: int
    partial: Mapping[str, Annotation] = field(default_factory=dict)
    """Case id -> what was annotated, of the cases in which not all of it was."""
    previous: Mapping[str, Any] | None = None
    """Case id -> (*spatial) label indices of the stage before, in memory or on disk."""
    foreground_from: Literal["case", "class"] = "case"
    """What a sample that is to hold foreground chooses first."""
    foreground_unit: Literal["voxel", "lesion"] = "voxel"
    """What of a structure counts alike: its voxels, or its connected parts."""
    positions: tuple[int, ...] | None = None
    """Which samples of each batch this process cuts; None: all."""
    _holders: tuple[tuple[Structure, tuple[str, ...]], ...] = field(
        init=False, repr=False, compare=False, default=()
    )
    """With `foreground_from` "class": each structure that occurs, and the cases that have it."""

    def __post_init__(self) -> None:
        """Look up which cases have which structure, where that is asked for.

        Raises:
            ValueError: If there are no lesions to choose from, or labels of a stage before do not
                fit the cases.
        """
        if self.foreground_unit == "lesion":
            unknown = [case for case in self.case_ids if self.entries[case].lesions is None]
            if unknown:
                raise ValueError(
                    f"the lesions of {len(unknown)} cases are not known: {unknown[:5]}"
                )
        if self.previous is not None:
            _check_previous(self.previous, {case: self.entries[case] for case in self.case_ids})
        if self.foreground_from == "class":
            sought = {case: [s for s, _ in self._present(case)] for case in self.case_ids}
            holders = {s: tuple(c for c in sought if s in sought[c]) for s in self.structures}
            occurring = tuple((s, cases) for s, cases in holders.items() if cases)
            object.__setattr__(self, "_holders", occurring)

    def numbers(self, batch: int) -> tuple[int, ...]:
        """Return which patches of the run this process cuts of a batch."""
        positions = range(self.batch_size) if self.positions is None else self.positions
        return tuple(batch * self.batch_size + position for position in positions)

    def draw(self, k: int) -> Patch:
        """Return patch k of the run."""
        rng = np.random.Generator(
            np.random.Philox(key=[self.seed, _STREAM_PATCHES], counter=[0, k, 0, 0])
        )
        position = k % self.batch_size
        forced = position >= round(self.batch_size * (1 - self.foreground_fraction))
        case_id, center = self._chosen(rng, forced=forced)
        start = self._start(self.entries[case_id].shape, center, rng)
        return self._cut(self.entries[case_id], start, case_id, k)

    def _chosen(
        self, rng: np.random.Generator, *, forced: bool
    ) -> tuple[str, NDArray[np.int32] | None]:
        """Return a random case and the voxel to centre on; None: any place."""
        if forced and self._holders:
            structure, holders = self._holders[int(rng.integers(len(self._holders)))]
            case_id = holders[int(rng.integers(len(holders)))]
            return case_id, self._voxel(dict(self._present(case_id))[structure], rng)
        case_id = self.case_ids[int(rng.integers(len(self.case_ids)))]
        if forced:
            return case_id, self._foreground_voxel(case_id, rng)
        return case_id, _annotated_voxel(self.entries[case_id], rng)

    def _foreground_voxel(self, case_id: str, rng: np.random.Generator) -> NDArray[np.int32] | None:
        """Return a random voxel of a random structure that was annotated; None if there is none."""
        present = self._present(case_id)
        return self._voxel(present[int(rng.integers(len(present)))][1], rng) if present else None

    def _present(self, case_id: str) -> list[tuple[Structure, list[NDArray[np.int32]]]]:
        """Return each structure that is in a case and was annotated, with its voxels in groups.

        A group holds a label, or with `foreground_unit` "lesion" a connected part.
        """
        entry, partial = self.entries[case_id], self.partial.get(case_id)
        found = []
        for structure in self.structures if partial is None else partial.structures:
            if self.foreground_unit == "lesion" and entry.lesions is not None:
                groups = entry.lesions.of(structure, entry.locations)
            else:
                groups = [entry.locations[n] for n in structure if n in entry.locations]
            if groups:
                found.append((structure, groups))
        return found

    def _voxel(
        self, groups: Sequence[NDArray[np.int32]], rng: np.random.Generator
    ) -> NDArray[np.int32]:
        """Return a random voxel of a random lesion, or of all groups together."""
        if self.foreground_unit == "lesion":
            groups = [groups[int(rng.integers(len(groups)))]]
        ends = np.cumsum([len(group) for group in groups])
        number = int(rng.integers(ends[-1]))
        place = int(np.searchsorted(ends, number, side="right"))
        voxel: NDArray[np.int32] = groups[place][number - ends[place]]
        return voxel

    def _start(
        self,
        shape: tuple[int, ...],
        center: NDArray[np.int32] | None,
        rng: np.random.Generator,
    ) -> tuple[int, ...]:
        start = []
        for axis, (length, size) in enumerate(
            zip(shape, self._extent(self.patch_size), strict=True)
        ):
            missing = max(0, size - length)
            low, high = -(missing // 2), length + missing - missing // 2 - size
            if center is None:
                start.append(int(rng.integers(low, max(low, high) + 1)))
            else:
                start.append(max(low, int(center[axis]) - size // 2))
        return tuple(start)

    def _cut(self, entry: Entry, start: tuple[int, ...], case_id: str, k: int) -> Patch:
        patch = self._extent(self.patch_size)
        size = patch if self.read_size is None else self._extent(self.read_size(k))
        origin = [s - (big - own) // 2 for s, big, own in zip(start, size, patch, strict=True)]
        image = cut(entry.image, origin, size).astype(np.float32, copy=False)
        segmentation = cut(entry.segmentation, origin, size)
        outside = None if entry.outside is None else cut(entry.outside, origin, size, fill=True)
        previous = None if self.previous is None else cut(self.previous[case_id], origin, size)
        if len(self.patch_size) == 2:
            image, segmentation = image[:, 0], segmentation[0]
            outside = None if outside is None else outside[0]
            previous = None if previous is None else previous[0]
        partial = self.partial.get(case_id)
        return Patch(
            image=image,
            segmentation=segmentation,
            outside=outside,
            case_id=case_id,
            index=k,
            annotated=None if partial is None else partial.channels,
            previous=previous,
        )

    def _extent(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size along the three axes of a case: a 2D patch is one slice thick."""
        return (1,) * (3 - len(size)) + size


def _check_previous(previous: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Refuse labels of a stage before that are missing or on another grid."""
    problems = []
    for case, entry in entries.items():
        if case not in previous:
            problems.append(f"  case {case!r}: nothing was found in the stage before")
        elif (found := tuple(previous[case].shape)) != entry.shape:
            problems.append(f"  case {case!r}: labels of shape {found}, expected {entry.shape}")
    if problems:
        lines = [*problems[:20], *(["  ..."] if len(problems) > 20 else [])]
        raise ValueError("\n".join([f"{len(problems)} cases of a cascade do not fit:", *lines]))


def _annotated_voxel(entry: Entry, rng: np.random.Generator) -> NDArray[np.int32] | None:
    """Return a random voxel without the ignore label; None where the dataset has no such label."""
    voxels = entry.locations.get(ANNOTATED)
    return None if voxels is None or not len(voxels) else voxels[rng.integers(len(voxels))]


def cut(array: Any, start: Sequence[int], size: Sequence[int], fill: float = 0) -> NDArray[Any]:
    """Return a window of the last axes; what lies beyond the array is `fill`.

    Examples:
        >>> cut(np.arange(4), [-1], [3]).tolist()
        [0, 0, 1]
    """
    lead = array.ndim - len(start)
    lengths = array.shape[lead:]
    low = [max(0, first) for first in start]
    high = [
        max(lo, min(length, first + extent))
        for lo, length, first, extent in zip(low, lengths, start, size, strict=True)
    ]
    window = array[(slice(None),) * lead + tuple(map(slice, low, high))]
    if tuple(window.shape[lead:]) == tuple(size):
        return np.asarray(window)
    out = np.full((*array.shape[:lead], *size), fill, dtype=array.dtype)
    place = tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start, strict=True))
    out[(slice(None),) * lead + place] = window
    return out
