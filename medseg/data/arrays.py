"""Compressed arrays on disk, written and read chunk by chunk.

Windows are read without holding Python's global lock, so that threads that cut patches stall
nobody. blosc2's own slicing holds it from the first byte read to the last one unpacked. Here the
packed bytes of the chunks that are needed are read by the operating system, and unpacked by a call
that lets go of the lock; no handle is shared between threads.

Source:
    The contiguous frame format (header, chunks, index of their offsets) and the b2nd layout
    (chunks and their blocks in C order) of C-Blosc2.
"""

from __future__ import annotations

import math
import multiprocessing
import struct
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import blosc2
import numpy as np
from numpy.typing import NDArray

from medseg.errors import DatasetError
from medseg.execute.resources import num_cpus

DAMAGE = (
    OSError, EOFError, BadZipFile, RuntimeError, KeyError, ValueError, TypeError, AttributeError,
    SyntaxError, OverflowError, struct.error,
)  # fmt: skip
"""What reading damaged files of an entry ends with; blosc2 parses a header as Python."""

_COMPRESSION = {"codec": blosc2.Codec.ZSTD, "clevel": 1}
_SMALLEST_CHUNK = 1 << 18
"""Voxels; each chunk costs some time when it is written, however small it is."""
_LARGE_BYTES = 1 << 24
"""Arrays from which on starting threads pays."""

_FRAME_HEADER = struct.Struct(">2s8sxixQx4sxqxq")
"""Marks, name, lengths of header and frame, flags, bytes unpacked and packed; x: a type's mark."""
_FRAME_NAME = b"b2frame\0"
_FRAME_VERSION = 2
_CHUNK_HEADER = struct.Struct("<4xi4xi16x")
"""Bytes of a chunk unpacked, and packed with this header."""


def write_array(path: Path, array: NDArray[Any], chunk: tuple[int, ...], kind: Any = None) -> None:
    """Write an array chunk by chunk, so that no copy of it is made, as its own type or `kind`."""
    lead = array.ndim - len(chunk)
    chunks = (1,) * lead + _chunk(chunk, array.shape[lead:])
    target = blosc2.empty(
        array.shape,
        dtype=np.dtype(kind or array.dtype),
        urlpath=str(path),
        mode="w",
        chunks=chunks,
        cparams={**_COMPRESSION, "nthreads": _num_threads(array.nbytes)},
    )
    for start in np.ndindex(*(-(-n // c) for n, c in zip(array.shape, chunks, strict=True))):
        place = tuple(slice(s * c, (s + 1) * c) for s, c in zip(start, chunks, strict=True))
        target[place] = np.ascontiguousarray(array[place], dtype=target.dtype)


def _num_threads(num_bytes: int) -> int:
    """Return all processors for a large array, 1 for a small one and in one of several workers."""
    is_alone = multiprocessing.parent_process() is None
    return num_cpus() if is_alone and num_bytes > _LARGE_BYTES else 1


def _chunk(size: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunk for readers of windows of `size`.

    A chunk is unpacked as a whole, so small ones waste least at the borders of a window. Chunks
    of thin windows are made thicker, up to the smallest size.

    Examples:
        >>> _chunk((1, 256, 256), (80, 300, 300)), _chunk((1, 64, 64), (30, 60, 60))
        ((4, 256, 256), (30, 60, 60))
        >>> _chunk((128, 128, 128), (200, 300, 250)), _chunk((16, 320, 320), (30, 512, 512))
        ((64, 64, 64), (16, 160, 160))
    """
    fitting = [min(part, length) for part, length in zip(size, shape, strict=True)]
    while True:
        longest = fitting.index(max(fitting))
        half = -(-fitting[longest] // 2)
        if math.prod(fitting) // fitting[longest] * half < _SMALLEST_CHUNK:
            break
        fitting[longest] = half
    for axis, length in enumerate(shape):
        missing = -(-_SMALLEST_CHUNK // math.prod(fitting))
        fitting[axis] = min(length, fitting[axis] * missing)
    return tuple(fitting)


class StoredArray:
    """An array on disk that is read where it is sliced; several threads may do so at once."""

    __slots__ = ("_array", "_blocks", "_chunks", "_path", "_places", "dtype", "ndim", "shape")

    def __init__(self, path: Path, spatial: tuple[int, ...]) -> None:
        """Open the file of an array with these last axes.

        Raises:
            ValueError: If it has others.
        """
        blosc2.set_releasegil(True)
        self._path = path
        self._array: Any = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
        self.shape: tuple[int, ...] = tuple(self._array.shape)
        self.dtype: np.dtype[Any] = self._array.dtype
        self.ndim = len(self.shape)
        self._chunks, self._blocks = tuple(self._array.chunks), tuple(self._array.blocks)
        self._places = _chunk_places(path, int(self._array.schunk.nchunks))
        if self.shape[-len(spatial) :] != spatial:
            raise ValueError(f"{path.name} is of shape {self.shape}, entry.json says {spatial}")

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Return a part of the array, in memory.

        Args:
            index: Slices without a step, or `...`.

        Raises:
            DatasetError: If the file is damaged.
        """
        window = _window(index, self.shape)
        try:
            return self._read(window)
        except DAMAGE as error:
            raise unreadable(self._path.parent, f"{self._path.name}: {error}") from error

    def _read(self, window: Sequence[tuple[int, int]]) -> NDArray[Any]:
        """Return the window that starts and stops there along each axis."""
        out = np.empty([max(0, stop - start) for start, stop in window], dtype=self.dtype)
        if not out.size:
            return out
        counts = [-(-length // size) for length, size in zip(self.shape, self._chunks, strict=True)]
        padded = [-(-c // b) * b for c, b in zip(self._chunks, self._blocks, strict=True)]
        unpacked = np.empty(padded, dtype=self.dtype)
        met = [_met(*ends, size) for ends, size in zip(window, self._chunks, strict=True)]
        with self._path.open("rb") as file:
            for parts in product(*met):
                numbers, sources, targets = zip(*parts, strict=True)
                packed = self._packed(file, int(np.ravel_multi_index(numbers, counts)))
                blosc2.decompress2(_checked(packed, unpacked.nbytes), dst=unpacked, nthreads=1)
                out[targets] = _in_order(unpacked, self._blocks)[sources]
        return out

    def _packed(self, file: BinaryIO, number: int) -> bytes:
        """Return the packed bytes of a chunk; blosc2 makes them where the file does not hold it."""
        place = self._places.get(number)
        if place is None:
            chunk: bytes = self._array.schunk.get_chunk(number)
            return chunk
        file.seek(place[0])
        return file.read(place[1])


def unreadable(path: Path, reason: object) -> DatasetError:
    """Return the error for an entry that cannot be read."""
    return DatasetError(
        f"{path}: preprocessed case cannot be read ({reason}). "
        "Delete this folder and run 'medseg preprocess' again."
    )


def _chunk_places(path: Path, num_chunks: int) -> dict[int, tuple[int, int]]:
    """Return where the chunks of a file lie: number -> first byte, and bytes up to the next one.

    Chunks of one value alone have no bytes. Of a file in another version of the format nothing
    is known.
    """
    with path.open("rb") as file:
        _, name, first, _, flags, _, length = _FRAME_HEADER.unpack(file.read(_FRAME_HEADER.size))
        if name != _FRAME_NAME or flags[0] & 15 != _FRAME_VERSION:
            return {}
        file.seek(first + length)
        index = file.read()
    offsets = np.empty(num_chunks, dtype="<i8")
    blosc2.decompress2(_checked(index, offsets.nbytes), dst=offsets, nthreads=1)
    held = np.flatnonzero(offsets >= 0)
    held = held[np.argsort(offsets[held])]
    starts = offsets[held]
    lengths = np.diff(starts, append=length)
    if len(held) and (starts[0] < 0 or lengths.min() <= 0):
        raise ValueError("its table of chunks is damaged")
    return {
        int(number): (first + int(start), int(size))
        for number, start, size in zip(held, starts, lengths, strict=True)
    }


def _checked(packed: bytes, num_bytes: int) -> bytes:
    """Return a packed chunk without what follows it, having checked how much it unpacks to."""
    unpacked, length = _CHUNK_HEADER.unpack_from(packed)
    if unpacked != num_bytes or not _CHUNK_HEADER.size <= length <= len(packed):
        raise ValueError(f"a chunk of {num_bytes} bytes says that it has {unpacked}")
    return packed[:length]


def _met(start: int, stop: int, size: int) -> list[tuple[int, slice, slice]]:
    """Return the chunks along an axis that a window meets: number, part of it, part of the window.

    Examples:
        >>> _met(5, 9, size=4)
        [(1, slice(1, 4, None), slice(0, 3, None)), (2, slice(0, 1, None), slice(3, 4, None))]
    """
    found = []
    for number in range(start // size, -(-stop // size)):
        first = number * size
        low, high = max(start, first), min(stop, first + size)
        found.append((number, slice(low - first, high - first), slice(low - start, high - start)))
    return found


def _in_order(unpacked: NDArray[Any], blocks: Sequence[int]) -> NDArray[Any]:
    """Return a chunk, which holds one block after the other, as the array it stands for."""
    grid = [length // block for length, block in zip(unpacked.shape, blocks, strict=True)]
    ndim = len(grid)
    axes = [axis for pair in zip(range(ndim), range(ndim, 2 * ndim), strict=True) for axis in pair]
    return unpacked.reshape(*grid, *blocks).transpose(axes).reshape(unpacked.shape)


def _window(index: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return where an index starts and stops along each axis.

    Examples:
        >>> _window((slice(2), ..., slice(-3, None)), (4, 5, 6))
        [(0, 2), (0, 5), (3, 6)]
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    place = parts.index(Ellipsis)
    parts[place : place + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if len(parts) != len(shape) or any(
        not isinstance(part, slice) or part.step not in (None, 1) for part in parts
    ):
        raise TypeError(f"a stored array of shape {shape} is read by slices, got {index}")
    return [part.indices(length)[:2] for part, length in zip(parts, shape, strict=True)]
