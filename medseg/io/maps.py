"""Large maps of numbers from 0 to 1, such as probabilities, written part by part.

Shape letters: I J K axes of the image, L maps.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.io.image import Header
from medseg.io.names import map_extension
from medseg.io.space import full_disk_named, require_space
from medseg.io.write import SHARE_STEP, as_shares

Index = tuple[slice | int, ...]

_PATIENCE_SECONDS = 2.0
"""How long a thread that writes is waited for where all is thrown away."""
_PART_BYTES = 2**24
"""Held in memory at a time."""
_ITEM = np.dtype(np.uint16)


class MapWriter:
    """A file (I, J, K, L) of numbers from 0 to 1, whole under its name or not there at all.

    It is an uncompressed `.nii` of two bytes per number, in steps of 1/65535; the header holds the
    factor that every reader applies, and the names of the maps. Parts may come in any order and
    from any thread; each is on its way to the disk when `write` returns, so that memory holds
    little more than a part. Parts that are whole in I and J (slices of K) are the quickest. A part
    that is not costs reading and writing all the slices it touches: let it be thick.

    Nothing is kept where the block it is used in ends with an error:

        with MapWriter(path, header, ("background", "liver")) as maps:
            maps.write(np.s_[:, :, 5:9, :], probabilities)
    """

    def __init__(
        self,
        path: str | Path,
        header: Header,
        names: Sequence[str],
        *,
        initial: Sequence[float] | None = None,
    ) -> None:
        """Remember what is to be written; the file is made when the block is entered.

        Args:
            path: Target, ending in `.nii`; the folder is made if missing.
            header: Header of the image the maps belong to.
            names: One for each map, in order.
            initial: What each map holds where nothing is written; None: 0.
        """
        self.path = Path(path)
        if self.path.suffix.lower() != ".nii":
            raise DatasetError(f"{self.path}: maps are written part by part as .nii; name it so.")
        self.shape = (*header.grid.shape, len(names))
        self._header, self._names = header, tuple(names)
        self._initial = tuple(initial or [0.0] * len(names))
        self._lock = threading.Lock()
        self._file: int | None = None
        self._part = self.path
        self._offset = 0

    def __enter__(self) -> MapWriter:
        """Make the file, having asked whether it fits.

        Raises:
            DatasetError: If the disk has no room for it.
        """
        from medseg.io import nifti

        front = nifti.header_bytes(
            _ITEM, self.shape, self._header, slope=SHARE_STEP, extension=map_extension(self._names)
        )
        self._offset = len(front)
        size = self._offset + math.prod(self.shape) * _ITEM.itemsize
        require_space(self.path, size)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with full_disk_named(self.path):
            self._part = self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.part"
            self._file = os.open(self._part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            try:
                os.ftruncate(self._file, size)
                self._put(front, 0)
                for number, value in enumerate(self._initial):
                    if value:
                        self._fill(number, value)
            except BaseException:
                self._discard()
                raise
        return self

    def write(self, index: Index, values: NDArray[np.floating[Any]]) -> None:
        """Write a part.

        Args:
            index: Where it lies in (I, J, K, L): slices of step 1 and numbers; axes left out at the
                end are whole.
            values: Numbers from 0 to 1 of the shape of that part; what lies beyond is cut off.

        Raises:
            DatasetError: If the disk is full; leave the block then.
        """
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        ranges = [_range(entry, length) for entry, length in zip(index, self.shape, strict=True)]
        lengths = tuple(stop - start for start, stop in ranges)
        entries = zip(index, lengths, strict=True)
        expected = tuple(length for entry, length in entries if isinstance(entry, slice))
        if values.shape != expected:
            raise ValueError(f"the part has the shape {values.shape}; expected {expected}")
        whole = values.reshape(lengths)
        (i0, i1), (j0, j1), (k0, k1), (l0, l1) = ranges
        with full_disk_named(self.path), self._lock:
            for number in range(l0, l1):
                for low, high in self._slices(k0, k1):
                    part = as_shares(whole[:, :, low - k0 : high - k0, number - l0])
                    self._write_block((slice(i0, i1), slice(j0, j1)), (low, high), number, part)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name if all went well, else remove it.

        Raises:
            DatasetError: If the disk is full.
        """
        if kind is not None:
            self._discard()
            return
        try:
            with full_disk_named(self.path):
                os.fsync(self._opened())
                self._close()
                os.replace(self._part, self.path)
        except BaseException:
            self._discard()
            raise

    def _slices(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of K whose slices fit into memory together."""
        step = max(1, _PART_BYTES // (self.shape[0] * self.shape[1] * _ITEM.itemsize))
        for low in range(start, stop, step):
            yield low, min(low + step, stop)

    def _write_block(
        self,
        plane: tuple[slice, slice],
        slices: tuple[int, int],
        number: int,
        part: NDArray[np.uint16],
    ) -> None:
        """Write (i, j, k) steps into some slices of one map; what lies beside them stays."""
        size_i, size_j, size_k, _ = self.shape
        low, high = slices
        offset = self._offset + (number * size_k + low) * size_i * size_j * _ITEM.itemsize
        if part.shape[:2] == (size_i, size_j):
            self._put(np.ascontiguousarray(part.T), offset)
            return
        block = np.empty((high - low, size_j, size_i), dtype=_ITEM)
        self._get(block, offset)
        block.T[(*plane, slice(None))] = part
        self._put(block, offset)

    def _fill(self, number: int, value: float) -> None:
        size_i, size_j, size_k, _ = self.shape
        stored = as_shares(np.array(value))
        for low, high in self._slices(0, size_k):
            part = np.full((size_i, size_j, high - low), stored, dtype=_ITEM)
            self._write_block((slice(None), slice(None)), (low, high), number, part)

    def _put(self, content: Any, offset: int) -> None:
        view = memoryview(content).cast("B")
        while view:
            count = os.pwrite(self._opened(), view, offset)
            view, offset = view[count:], offset + count

    def _get(self, target: NDArray[Any], offset: int) -> None:
        view = target.data.cast("B")
        while view:
            count = os.preadv(self._opened(), [view], offset)
            if not count:
                raise OSError(f"{self._part} was cut short by another program")
            view, offset = view[count:], offset + count

    def _opened(self) -> int:
        if self._file is None:
            raise ValueError("maps are written inside the block: with MapWriter(...) as maps")
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _discard(self) -> None:
        """Close and remove the part, once no other thread writes to it any more."""
        is_free = self._lock.acquire(timeout=_PATIENCE_SECONDS)
        try:
            self._close()
        finally:
            if is_free:
                self._lock.release()
        self._part.unlink(missing_ok=True)


def _range(entry: slice | int, length: int) -> tuple[int, int]:
    """Return start and stop of one entry of an index."""
    if not isinstance(entry, slice):
        start = range(length)[entry]
        return start, start + 1
    start, stop, step = entry.indices(length)
    if step != 1:
        raise ValueError(f"a part has the step {step}; expected 1")
    return start, max(start, stop)
