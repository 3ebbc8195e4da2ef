"""Which patch is the k-th one, and how it is cut. Depends on (seed, k) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.store import ANNOTATED, Entry
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """What was annotated in a case that is not annotated completely."""

    channels: tuple[bool, ...]
    """Whether the structure of each logit channel was."""
    structures: tuple[tuple[int, ...], ...]
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
    structures: Sequence[tuple[int, ...]]
    """Indices of each foreground structure (label or region)."""
    seed: int
    partial: Mapping[str, Annotation] = field(default_factory=dict)
    """Case id -> what was annotated, of the cases in which not all of it was."""

    def draw(self, k: int) -> Patch:
        """Return patch k of the run."""
        rng = np.random.Generator(
            np.random.Philox(key=[self.seed, _STREAM_PATCHES], counter=[0, k, 0, 0])
        )
        case_id = self.case_ids[rng.integers(len(self.case_ids))]
        entry = self.entries[case_id]
        position_in_batch = k % self.batch_size
        forced = position_in_batch >= round(self.batch_size * (1 - self.foreground_fraction))
        center = self._foreground_voxel(case_id, rng) if forced else _annotated_voxel(entry, rng)
        start = self._start(entry.shape, center, rng)
        return self._cut(entry, start, case_id, k)

    def _foreground_voxel(self, case_id: str, rng: np.random.Generator) -> NDArray[np.int32] | None:
        """Return a random voxel of a random structure that was annotated; None if there is none."""
        locations, partial = self.entries[case_id].locations, self.partial.get(case_id)
        present = [
            [locations[label] for label in labels if label in locations]
            for labels in (self.structures if partial is None else partial.structures)
        ]
        present = [voxels for voxels in present if voxels]
        if not present:
            return None
        groups = present[rng.integers(len(present))]
        number = int(rng.integers(sum(len(group) for group in groups)))
        for group in groups:
            if number < len(group):
                voxel: NDArray[np.int32] = group[number]
                return voxel
            number -= len(group)
        return None

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
        if len(self.patch_size) == 2:
            image, segmentation = image[:, 0], segmentation[0]
            outside = None if outside is None else outside[0]
        partial = self.partial.get(case_id)
        return Patch(
            image=image,
            segmentation=segmentation,
            outside=outside,
            case_id=case_id,
            index=k,
            annotated=None if partial is None else partial.channels,
        )

    def _extent(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size along the three axes of a case: a 2D patch is one slice thick."""
        return (1,) * (3 - len(size)) + size


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
