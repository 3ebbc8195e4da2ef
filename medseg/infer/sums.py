"""Weighted sums of tile logits, held for a window of rows along one axis.

Tiles come in the order of that axis, so rows behind them are final and leave the window; memory
does not depend on how long the image is. The window is a ring, in memory or in a file.

Shape letters: L channels, n0 n1 n2 axes of the volume, W rows of the window, a b the other axes.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from medseg.io.space import full_disk_named, require_space

Box = tuple[slice, slice, slice]
PIECE_ELEMENTS = 2**22
"""Logits weighted at once when a tile is added; 16 MB."""


class Store(Protocol):
    """Rows (W, L, a, b) of float32 that start as zeros."""

    device: torch.device

    def add(self, rows: slice, across: tuple[slice, slice], values: torch.Tensor) -> None:
        """Add values (rows, L, a, b) to part of some rows."""

    def read(self, rows: slice) -> torch.Tensor:
        """Return rows (rows, L, a, b), which may share memory with the store."""

    def clear(self, rows: slice) -> None:
        """Set rows to zero."""


class MemoryStore:
    """Rows in the memory of a device."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(mode=False):  # an ordinary tensor, whatever is done with it later
            self._rows = torch.zeros(shape, device=device)

    def add(self, rows: slice, across: tuple[slice, slice], values: torch.Tensor) -> None:
        """Add values (rows, L, a, b) to part of some rows."""
        self._rows[(rows, slice(None), *across)] += values

    def read(self, rows: slice) -> torch.Tensor:
        """Return rows (rows, L, a, b), which share memory with the store."""
        return self._rows[rows]

    def clear(self, rows: slice) -> None:
        """Set rows to zero."""
        self._rows[rows] = 0


class FileStore:
    """Rows in a scratch file, of which one at a time is in memory.

    The file has no name from the start where the system allows it, and takes no disk space once it
    is closed or the process has ended, in whatever way.
    """

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None) -> None:
        self._row = tuple(shape[1:])
        self._bytes = 4 * math.prod(self._row)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="medseg-", suffix=".sums")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._place = Path(folder or tempfile.gettempdir()) / "the scratch file of a prediction"
        self._allocate(shape[0] * self._bytes)

    def _allocate(self, size: int) -> None:
        """Claim the disk space now: a write to a mapped page of a full disk kills the process.

        Raises:
            DatasetError: If the disk has less room.
        """
        require_space(self._place, size)
        with full_disk_named(self._place):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)

    def add(self, rows: slice, across: tuple[slice, slice], values: torch.Tensor) -> None:
        """Add values (rows, L, a, b) to part of some rows."""
        for row, part in zip(range(rows.start, rows.stop), values.cpu().numpy(), strict=True):
            self._mapped(row)[(slice(None), *across)] += part

    def read(self, rows: slice) -> torch.Tensor:
        """Return a copy of rows (rows, L, a, b)."""
        copies = [np.array(self._mapped(row)) for row in range(rows.start, rows.stop)]
        return torch.from_numpy(np.stack(copies))

    def clear(self, rows: slice) -> None:
        """Set rows to zero."""
        for row in range(rows.start, rows.stop):
            self._mapped(row)[...] = 0

    def _mapped(self, row: int) -> np.memmap[tuple[int, ...], np.dtype[np.float32]]:
        """Return one row; its pages leave the process when the array does."""
        return np.memmap(
            self._file, dtype=np.float32, mode="r+", offset=row * self._bytes, shape=self._row
        )


class Sums:
    """Sums of tiles and of their weights over a window of rows; rows behind it are forgotten."""

    def __init__(self, shape: tuple[int, int, int], axis: int, store: Store, window: int) -> None:
        """Begin with an empty window at row 0.

        Args:
            shape: (n0, n1, n2) of the volume.
            axis: Axis whose rows pass through the window.
            store: (window, L, a, b).
            window: Rows held at a time.
        """
        self.shape, self.axis, self.window = shape, axis, window
        self.device = store.device
        self._store = store
        across = tuple(length for d, length in enumerate(shape) if d != axis)
        self._weights = MemoryStore((window, 1, *across), store.device)
        self._first = 0
        self._is_weighted = False

    def add(self, box: Box, values: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Add the logits of one tile; what lies in rows that are forgotten is left out.

        Args:
            box: Where the tile lies in the volume.
            values: (L, *tile), any real type, on any device.
            weight: (*tile) float32 on the device of the sums; None where tiles do not overlap.
        """
        rows, across = self._split(box)
        if rows.stop > self._first + self.window:
            raise ValueError(
                f"rows {rows.start} to {rows.stop} are not within the window of {self.window} rows "
                f"from {self._first}"
            )
        values = values.movedim(self.axis + 1, 0)
        if weight is not None:
            self._is_weighted = True
            weight = weight.movedim(self.axis, 0)[:, None]
        thickness = max(1, PIECE_ELEMENTS // max(1, values[0].numel()))
        for start in range(max(rows.start, self._first), rows.stop, thickness):
            piece = slice(start, min(start + thickness, rows.stop))
            self._add_rows(piece, across, values, weight, rows.start)

    def _add_rows(
        self,
        rows: slice,
        across: tuple[slice, slice],
        values: torch.Tensor,
        weight: torch.Tensor | None,
        first: int,
    ) -> None:
        for slots, piece in self._slots(rows):
            own = slice(piece.start - first, piece.stop - first)
            part = values[own].to(self.device, torch.float32)
            if weight is not None:
                part = part * weight[own]
                self._weights.add(slots, across, weight[own])
            self._store.add(slots, across, part)

    def mean(self, start: int, stop: int) -> torch.Tensor:
        """Return the weighted mean of rows to which no tile will be added any more.

        Returns:
            (L, n0, n1, n2) but for `stop - start` rows along the axis, float32; it may share
            memory with the sums.
        """
        parts = []
        for slots, _ in self._slots(slice(start, stop)):
            rows = self._store.read(slots)
            parts.append(rows / self._weights.read(slots) if self._is_weighted else rows)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.movedim(0, self.axis + 1)

    def release(self, stop: int) -> None:
        """Forget all rows before one, which makes room for as many after the window."""
        if stop <= self._first:
            return
        if self.window < self.shape[self.axis]:
            for slots, _ in self._slots(slice(self._first, min(stop, self._first + self.window))):
                self._store.clear(slots)
                self._weights.clear(slots)
        self._first = stop

    def _slots(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Yield (slots of the ring, rows) of contiguous pieces."""
        start = rows.start
        while start < rows.stop:
            slot = start % self.window
            stop = min(rows.stop, start + self.window - slot)
            yield slice(slot, slot + stop - start), slice(start, stop)
            start = stop

    def _split(self, box: Box) -> tuple[slice, tuple[slice, slice]]:
        a, b = (part for d, part in enumerate(box) if d != self.axis)
        return box[self.axis], (a, b)
