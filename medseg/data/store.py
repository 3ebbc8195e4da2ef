"""The store of preprocessed cases: compressed arrays, addressed by what they were made from."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.data.arrays import DAMAGE, StoredArray, unreadable, write_array
from medseg.data.lesions import Lesions, find_lesions
from medseg.data.locations import ANNOTATED, read_locations, sample_locations, write_locations
from medseg.errors import DatasetError
from medseg.geometry import SpatialRecord
from medseg.schema.base import FORMAT_VERSION, format_json, read_json, write_json

_LARGEST_HALF = 6e4
_ROUNDING = 1e-3
"""Largest rounding error of a stored image, in standard deviations of its channel."""
_PART_SECONDS = 3600
_RENAMES = 5
"""Attempts at moving an entry into place, while other processes move theirs."""
Labels = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One preprocessed case, opened for reading; arrays stay on disk until they are sliced."""

    image: Any
    """(C, *spatial) float16 or float32: on disk, or a numpy array once loaded."""
    segmentation: Any
    """(*spatial) label map."""
    outside: Any | None
    """(*spatial) True outside the imaged region, or None."""
    locations: Mapping[int, NDArray[np.int32]]
    """Label -> (N, 3) sampled voxels with that label."""
    record: SpatialRecord
    lesions: Lesions | None = None
    """The connected parts these voxels lie in; None where they were not looked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the spatial shape in voxels."""
        return tuple(self.image.shape[1:])

    @property
    def memory_bytes(self) -> int:
        """Return the size of the arrays once loaded."""
        arrays = [self.image, self.segmentation, self.outside]
        return sum(int(a.dtype.itemsize * np.prod(a.shape)) for a in arrays if a is not None)

    def loaded(self) -> Entry:
        """Return the entry with its arrays in memory.

        Raises:
            DatasetError: If they cannot be read.
        """
        return replace(
            self,
            image=self.image[...],
            segmentation=self.segmentation[...],
            outside=None if self.outside is None else self.outside[...],
        )


class CaseStore:
    """Entries by key, and an index (case id -> key) for each configuration of each plans."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made at the first write."""
        self.folder = Path(folder)

    def has(self, key: str) -> bool:
        """Return whether an entry is there, whole: every file as long as it was written."""
        return _is_whole(self._path(key))

    def put(
        self,
        key: str,
        *,
        image: NDArray[np.float32],
        segmentation: Labels,
        outside: NDArray[np.bool_] | None,
        record: SpatialRecord,
        chunk: tuple[int, ...],
        ignore_label: int | None = None,
    ) -> None:
        """Write one entry; it appears under its key only when it is whole.

        An entry that is there and whole is kept, a damaged one replaced. Files are not flushed to
        the disk one by one, which would take longer than writing a small entry; what a power cut
        leaves too short does not fit the sizes in `entry.json`, and is made again.

        Args:
            key: Hash of everything the entry was made from.
            image: (C, *spatial).
            segmentation: (*spatial).
            outside: (*spatial) or None.
            record: The way back to the image's grid.
            chunk: Spatial size that readers usually ask for, in voxels.
            ignore_label: Label of voxels without annotation.
        """
        target = self._path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{key}.", suffix=".part"))
        try:
            write_array(part / "image.b2nd", image, chunk, storage_type(image))
            write_array(part / "segmentation.b2nd", segmentation, chunk)
            if outside is not None:
                write_array(part / "outside.b2nd", outside, chunk)
            locations = sample_locations(segmentation, ignore_label)
            lesions = find_lesions(segmentation, locations.keys() - {ANNOTATED}, locations)
            write_locations(part / "locations.npz", locations, lesions, segmentation.shape)
            sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
            entry = {"format_version": FORMAT_VERSION, **record.to_json(), "files": sizes}
            (part / "entry.json").write_text(format_json(entry), encoding="utf-8")
            part.chmod(0o755)
            _rename_once(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def sweep(self) -> None:
        """Delete what killed runs left half-written; younger than an hour may still be written."""
        for part in self.folder.glob("entries/*/.*.part"):
            if time.time() - part.stat().st_mtime > _PART_SECONDS:
                shutil.rmtree(part, ignore_errors=True)

    def open(self, key: str) -> Entry:
        """Open an entry for reading.

        Raises:
            DatasetError: If it is not there, not whole or not readable.
        """
        path = self._path(key)
        try:
            values = {**read_json(path / "entry.json")}
            _require_sizes(path, values.pop("files", {}))
            values.pop("format_version")
            record = SpatialRecord.from_json(values)
            shape, outside = tuple(record.shape_network), path / "outside.b2nd"
            locations, lesions = read_locations(path / "locations.npz", shape)
            return Entry(
                image=StoredArray(path / "image.b2nd", shape),
                segmentation=StoredArray(path / "segmentation.b2nd", shape),
                outside=StoredArray(outside, shape) if outside.exists() else None,
                locations=locations,
                lesions=lesions,
                record=record,
            )
        except DAMAGE as error:
            raise unreadable(path, error) from error

    def write_index(self, name: str, keys: Mapping[str, str], made_with: str) -> None:
        """Write case id -> key for one configuration (name: PLANS__CONFIG).

        Args:
            name: PLANS__CONFIG.
            keys: Case id -> key.
            made_with: Digest of the preprocessing parameters.
        """
        values = {"format_version": FORMAT_VERSION, "made_with": made_with}
        write_json(self._index(name), {**values, "entries": dict(sorted(keys.items()))})

    def read_index(self, name: str, made_with: str) -> dict[str, str]:
        """Return case id -> key.

        Raises:
            DatasetError: If this configuration has not been preprocessed, or with other parameters
                than `made_with`.
        """
        if not self._index(name).is_file():
            plans, _, configuration = name.partition("__")
            raise DatasetError(
                f"configuration {configuration!r} of plans {plans!r} has not been preprocessed "
                f"({self._index(name)} is missing). Run 'medseg preprocess' first."
            )
        index = read_json(self._index(name))
        if index.get("made_with") != made_with:
            raise DatasetError(
                f"{self._index(name)}: the cases were preprocessed for other plans than the "
                "present ones (spacing, axes or normalisation changed). Run 'medseg preprocess' "
                "again."
            )
        return dict(index["entries"])

    def _index(self, name: str) -> Path:
        return self.folder / "index" / f"{name}.json"

    def _path(self, key: str) -> Path:
        return self.folder / "entries" / key[:2] / key


def storage_type(image: NDArray[np.float32]) -> type[np.float16] | type[np.float32]:
    """Return float16, or float32 where float16 would change the image.

    It would where a value exceeds 6e4, or where rounding moves a voxel by more than a thousandth
    of its channel's standard deviation.

    Args:
        image: (C, *spatial).
    """
    for channel in image:
        largest = max(abs(float(channel.min())), abs(float(channel.max())))
        limit = _ROUNDING * _deviation(channel)
        if largest > _LARGEST_HALF or not _rounds_within(channel, largest, limit):
            return np.float32
    return np.float16


def _deviation(channel: NDArray[np.float32]) -> float:
    """Return the standard deviation; in parts, so that nothing of the image's size is made."""
    parts = np.array_split(channel.reshape(-1), max(1, channel.size >> 20))
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / max(1, channel.size)
    squares = 0.0
    for part in parts:
        apart = part - np.float32(mean)
        squares += float(np.square(apart, out=apart).sum(dtype=np.float64))
    return math.sqrt(squares / max(1, channel.size))


def _rounds_within(channel: NDArray[np.float32], largest: float, limit: float) -> bool:
    """Return whether float16 rounds no voxel by more than `limit`.

    A value of at most 2^n moves by at most 2^(n - 12), so that only larger ones are looked at.
    """
    bound = math.ldexp(1.0, math.frexp(largest)[1] - 12)
    if bound <= limit:
        return True
    hardest = math.ldexp(1.0, math.frexp(limit)[1] + 10) if limit > 0 else 0.0
    for part in np.array_split(channel.reshape(-1), max(1, channel.size >> 20)):
        suspects = part[np.abs(part) > hardest]
        if (np.abs(suspects - suspects.astype(np.float16)) > limit).any():
            return False
    return True


def digest(values: Any) -> str:
    """Return a short hash of JSON values: the key of an entry, or the mark of its making."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Return whether the folder of an entry holds its files, each of its size."""
    try:
        _require_sizes(path, read_json(path / "entry.json")["files"])
    except DAMAGE:
        return False
    return True


def _require_sizes(path: Path, sizes: Mapping[str, int]) -> None:
    """Refuse an entry whose files are not as long as they were written."""
    for name, expected in sizes.items():
        found = os.stat(path / name).st_size
        if found != expected:
            raise ValueError(f"{name} has {found} bytes, {expected} were written")


def _rename_once(part: Path, target: Path) -> None:
    """Move a whole entry into place; one that another process finished first is kept.

    What lies there and is not whole makes way, under a name that `sweep` knows.
    """
    for attempt in range(_RENAMES):
        try:
            os.rename(part, target)
            return
        except OSError as error:
            if _is_whole(target):
                shutil.rmtree(part, ignore_errors=True)
                return
            if attempt == _RENAMES - 1 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = part.with_name(f"{part.stem}.damaged{attempt}.part")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(target, aside)
        shutil.rmtree(aside, ignore_errors=True)
