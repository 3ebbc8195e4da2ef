"""The store of preprocessed cases: compressed arrays, addressed by what they were made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import blosc2
import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.geometry import SpatialRecord
from medseg.schema.base import FORMAT_VERSION, read_json, write_json

_COMPRESSION = {"codec": blosc2.Codec.ZSTD, "clevel": 3, "nthreads": 1}
_MIN_LOCATIONS = 10_000
_MIN_SHARE = 0.01
_SEED = 1234

ANNOTATED = -1
"""Key of the locations without the ignore label, in datasets that have one."""

Labels = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One preprocessed case, opened for reading; arrays stay on disk until they are sliced."""

    image: Any
    """(C, *spatial) float32: a blosc2 array, or a numpy array once loaded."""
    segmentation: Any
    """(*spatial) label map."""
    outside: Any | None
    """(*spatial) True outside the imaged region, or None."""
    locations: Mapping[int, NDArray[np.int32]]
    """Label -> (N, 3) sampled voxels with that label."""
    record: SpatialRecord

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
        """Return the entry with its arrays in memory."""
        return Entry(
            image=self.image[...],
            segmentation=self.segmentation[...],
            outside=None if self.outside is None else self.outside[...],
            locations=self.locations,
            record=self.record,
        )


class CaseStore:
    """Entries by key, and an index (case id -> key) for each configuration of each plans."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made at the first write."""
        self.folder = Path(folder)

    def has(self, key: str) -> bool:
        """Return whether an entry is there, whole."""
        return (self._path(key) / "entry.json").is_file()

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
            _write_array(part / "image.b2nd", image, chunk)
            _write_array(part / "segmentation.b2nd", segmentation, chunk)
            if outside is not None:
                _write_array(part / "outside.b2nd", outside, chunk)
            locations = sample_locations(segmentation, ignore_label)
            np.savez(part / "locations.npz", **{str(k): v for k, v in locations.items()})  # type: ignore[arg-type]
            write_json(part / "entry.json", record.to_json())
            part.chmod(0o755)
            _rename_once(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def open(self, key: str) -> Entry:
        """Open an entry for reading.

        Raises:
            DatasetError: If it is not there or not readable.
        """
        path = self._path(key)
        try:
            locations = _read_locations(path / "locations.npz")
            outside = path / "outside.b2nd"
            return Entry(
                image=_open_array(path / "image.b2nd"),
                segmentation=_open_array(path / "segmentation.b2nd"),
                outside=_open_array(outside) if outside.exists() else None,
                locations=locations,
                record=SpatialRecord.from_json(read_json(path / "entry.json")),
            )
        except (OSError, EOFError, BadZipFile, RuntimeError, KeyError, ValueError) as error:
            raise DatasetError(
                f"{path}: preprocessed case cannot be read ({error}). "
                "Delete this folder and run 'medseg preprocess' again."
            ) from error

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


def hash_files(paths: list[Path]) -> str:
    """Return the SHA-256 over the bytes of several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def digest(values: Any) -> str:
    """Return a short hash of JSON values: the key of an entry, or the mark of its making."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
    found = {int(v): flat == v for v in np.unique(flat) if v not in (0, ignore_label)}
    if ignore_label is not None:
        found[ANNOTATED] = flat != ignore_label
    return {
        label: _sample(np.flatnonzero(chosen), segmentation.shape, rng)
        for label, chosen in found.items()
    }


def _sample(
    voxels: NDArray[np.intp], shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.int32]:
    count = min(len(voxels), max(_MIN_LOCATIONS, math.ceil(len(voxels) * _MIN_SHARE)))
    chosen = np.sort(rng.choice(voxels, count, replace=False))
    return np.stack(np.unravel_index(chosen, shape), axis=1).astype(np.int32)


def _write_array(path: Path, array: NDArray[Any], chunk: tuple[int, ...]) -> None:
    lead = array.ndim - len(chunk)
    chunks = (1,) * lead + tuple(
        min(size, length) for size, length in zip(chunk, array.shape[lead:], strict=True)
    )
    contiguous = np.ascontiguousarray(array)
    blosc2.asarray(contiguous, urlpath=str(path), mode="w", chunks=chunks, cparams=_COMPRESSION)


def _open_array(path: Path) -> Any:
    return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})


def _read_locations(path: Path) -> dict[int, NDArray[np.int32]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {int(name): arrays[name] for name in arrays.files}


def _rename_once(part: Path, target: Path) -> None:
    """Move a whole entry into place; one that another process finished first is kept."""
    try:
        os.rename(part, target)
    except OSError:
        if not (target / "entry.json").is_file():
            raise
        shutil.rmtree(part, ignore_errors=True)
