"""One label map in a file of its own, with a mark of what it was made from."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from medseg.data.arrays import DAMAGE, StoredArray, write_array
from medseg.errors import DatasetError

_MARK = "made_with"


class LabelFile:
    """A label map on disk that is read where it is sliced; several threads may do so at once."""

    __slots__ = ("_array", "_path", "dtype", "made_with", "ndim", "shape")

    def __init__(self, path: Path) -> None:
        """Open a file that `write_labels` wrote."""
        opened: Any = blosc2.open(str(path), mode="r")
        self.made_with = str(opened.schunk.vlmeta[_MARK])
        self._path, self._array = path, StoredArray(path, tuple(opened.shape))
        self.shape, self.ndim = self._array.shape, self._array.ndim
        self.dtype: np.dtype[Any] = self._array.dtype

    def __getitem__(self, index: Any) -> NDArray[np.unsignedinteger[Any]]:
        """Return a part of the label map, in memory.

        Args:
            index: Slices without a step, or `...`.

        Raises:
            DatasetError: If the file is damaged.
        """
        try:
            return self._array[index]
        except DatasetError as error:
            raise DatasetError(
                f"{self._path}: this label map cannot be read. Delete it; it is made again when "
                "the training is started again."
            ) from error

    @property
    def memory_bytes(self) -> int:
        """Return the size of the label map once in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_labels(
    path: Path,
    labels: NDArray[np.unsignedinteger[Any]],
    *,
    chunk: tuple[int, ...],
    made_with: str,
) -> None:
    """Write a label map; it appears whole, in place of one that is there.

    Args:
        path: The file; its folder is made if need be.
        labels: (*spatial) label map.
        chunk: Size that readers usually ask for, in voxels.
        made_with: Mark of everything it was made from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        write_array(part / path.name, labels, chunk)
        written: Any = blosc2.open(str(part / path.name), mode="a")
        written.schunk.vlmeta[_MARK] = made_with
        (part / path.name).replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def open_labels(path: Path, made_with: str) -> LabelFile | None:
    """Open a label map; None where there is none, it is damaged, or made from something else."""
    if not path.is_file():
        return None
    try:
        found = LabelFile(path)
    except DAMAGE:
        return None
    return found if found.made_with == made_with else None
