"""Logits of one image, made as they are asked for: rows along one axis, front to back.

Shape letters: C image channels, L logit channels, n0 n1 n2 network axes, B tiles of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional

from medseg.augment.previous import one_hot
from medseg.infer.runner import Runner, evaluating
from medseg.infer.sums import Box, FileStore, MemoryStore, Sums
from medseg.infer.tiles import importance, padding, tile_starts

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class NotFiniteError(Exception):
    """The networks returned values that are not finite."""


class StoppedError(Exception):
    """Somebody asked to stop."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """What the tiles are cut from, padded to hold one."""

    image: torch.Tensor
    """(C, n0, n1, n2)."""
    previous: torch.Tensor | None
    """(n0, n1, n2) label indices that the stage before found."""
    tile: tuple[int, int, int]
    """A tile of a 2D configuration is one slice thick."""
    is_2d: bool
    inner: Box
    """Where the image lies within the padding."""

    @classmethod
    def of(
        cls, image: torch.Tensor, tile: tuple[int, ...], previous: torch.Tensor | None = None
    ) -> Volume:
        """Pad an image (C, n0, n1, n2) with zeros so that it holds a tile."""
        lacks = padding(image.shape[1:], tile)
        a, b, c = (
            slice(before, before + length)
            for (before, _), length in zip(lacks, image.shape[1:], strict=True)
        )
        d, e, f = (1, *tile)[-3:]
        return cls(
            image=_padded(image, lacks),
            previous=None if previous is None else _padded(previous, lacks),
            tile=(d, e, f),
            is_2d=len(tile) == 2,
            inner=(a, b, c),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape with padding."""
        a, b, c = self.image.shape[1:]
        return a, b, c

    def to(self, device: torch.device) -> Volume:
        """Return the same on a device."""
        previous = None if self.previous is None else self.previous.to(device)
        return replace(self, image=self.image.to(device), previous=previous)

    def cut(self, boxes: Sequence[Box], device: torch.device, num_previous: int) -> torch.Tensor:
        """Return tiles (B, C + num_previous, *tile) on a device, without the axis of slices."""
        tiles = torch.stack([self.image[(slice(None), *box)] for box in boxes])
        tiles = tiles.to(device, non_blocking=True)
        if self.previous is not None:
            found = torch.stack([self.previous[box] for box in boxes])
            found = found.to(device, non_blocking=True)
            tiles = torch.cat([tiles, one_hot(found, num_previous)], dim=1)
        return tiles.squeeze(2) if self.is_2d else tiles


def _padded(array: torch.Tensor, lacks: Sequence[tuple[int, int]]) -> torch.Tensor:
    if not any(amount for pair in lacks for amount in pair):
        return array
    return functional.pad(array, [amount for pair in reversed(lacks) for amount in pair])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where sums are kept, and how many tiles are evaluated at once."""

    axis: int = 0
    """Network axis whose rows come one after another."""
    window: int | None = None
    """Rows held at a time, padding included; None: all."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    in_file: bool = False
    """Whether the window lies in a scratch file."""
    scratch: Path | None = None
    """Folder of the scratch file; None: the system's for temporary files."""
    batch: int = 1
    """Images a network is given at once."""


class LogitRows:
    """The logits of one image; its tiles are evaluated when their rows are asked for."""

    def __init__(
        self,
        runner: Runner,
        volume: Volume,
        layout: Layout,
        *,
        step: float = 0.5,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare; nothing is evaluated yet.

        Args:
            runner: What turns tiles into logits.
            volume: The image.
            layout: Where sums are kept.
            step: Largest shift between tiles, as a fraction of the tile.
            progress: Called with (tiles done, tiles in total) after every batch.
            should_stop: Asked before every batch.
        """
        self.axis = layout.axis
        self.shape = tuple(part.stop - part.start for part in volume.inner)
        self.num_channels = runner.num_channels
        self._runner, self._volume, self._batch = runner, volume, layout.batch
        self._layout, self._should_stop = layout, should_stop
        self._progress = progress or (lambda done, total: None)
        self._boxes = tile_boxes(volume, step, layout.axis)
        self._done = 0
        self._sums: Sums | None = None
        self._weight = self._importance()

    @property
    def num_tiles(self) -> int:
        """Return how many tiles there are."""
        return len(self._boxes)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return logits of rows of the image, in any order that does not go back behind `release`.

        Returns:
            (L, n0, n1, n2) but for `stop - start` rows along the axis; float32, on `device`.

        Raises:
            NotFiniteError: If the networks gave values that are not finite.
            StoppedError: If somebody asked to stop.
        """
        before = self._volume.inner[self.axis].start
        sums = self._reach(stop + before)
        found = sums.mean(start + before, stop + before)
        inner = [part if d != self.axis else slice(None) for d, part in
                 enumerate(self._volume.inner)]  # fmt: skip
        found = found[(slice(None), *inner)]
        if not torch.isfinite(found.sum()):
            raise NotFiniteError
        return found

    def release(self, stop: int) -> None:
        """Forget rows before one."""
        if self._sums is not None:
            self._sums.release(stop + self._volume.inner[self.axis].start)

    def _reach(self, row: int) -> Sums:
        """Evaluate tiles until no other will touch rows before `row`."""
        sums = self._started()
        with torch.inference_mode(), evaluating(self._runner.networks):
            while self._done < len(self._boxes) and self._boxes[self._done][self.axis].start < row:
                self._advance(sums)
        return sums

    def _started(self) -> Sums:
        """Make room for the sums, if that has not been done."""
        if self._sums is None:
            self._volume = self._volume.to(self._layout.device)
            self._sums = self._new_sums()
        return self._sums

    def _advance(self, sums: Sums) -> None:
        """Evaluate one batch of tiles; a batch too large for the GPU is halved from then on."""
        if self._should_stop():
            raise StoppedError
        boxes = self._next_boxes()
        logits = self._evaluated(boxes)
        if logits is None:
            self._batch = (self._batch + 1) // 2
            logger.warning(
                "%s: out of memory; %d images at once from now on",
                self._runner.device, self._batch,
            )  # fmt: skip
            torch.cuda.empty_cache()
            return
        for box, values in zip(boxes, logits, strict=True):
            self._take(sums, box, values)

    def _evaluated(self, boxes: Sequence[Box]) -> torch.Tensor | None:
        """Return the logits of some tiles; None where the GPU is too full for so many.

        Nothing of the attempt is alive when it returns, so that its memory can be had.
        """
        try:
            tiles = self._volume.cut(boxes, self._runner.device, self._runner.num_previous)
            return self._runner.run(tiles, self._batch)
        except torch.OutOfMemoryError:
            if self._batch == 1:
                raise
        return None

    def _take(self, sums: Sums, box: Box, values: torch.Tensor) -> None:
        """Add the logits (L, *tile) of the next tile."""
        sums.add(box, values.unsqueeze(1) if self._volume.is_2d else values, self._weight)
        self._done += 1
        self._progress(self._done, len(self._boxes))

    def _next_boxes(self) -> list[Box]:
        """Return the tiles of the next batch: as many as fit into it and into the window."""
        first = self._boxes[self._done]
        found = self._boxes[self._done : self._done + self._batch]
        if self._layout.window is None:
            return found
        reach = first[self.axis].start + batch_rows(self._volume, self._layout)
        return [box for box in found if box[self.axis].stop <= reach]

    def _new_sums(self) -> Sums:
        shape, layout = self._volume.shape, self._layout
        window = min(layout.window or shape[self.axis], shape[self.axis])
        across = (length for d, length in enumerate(shape) if d != self.axis)
        size = (window, self.num_channels, *across)
        store = FileStore(size, layout.scratch) if layout.in_file else None
        return Sums(shape, self.axis, store or MemoryStore(size, layout.device), window)

    def _importance(self) -> torch.Tensor | None:
        """Return the weight of a tile's voxels, or None where tiles do not overlap."""
        tile, shape = self._volume.tile, self._volume.shape
        if tile[self._volume.is_2d :] == shape[self._volume.is_2d :]:
            return None
        weight = torch.from_numpy(importance(tile[self._volume.is_2d :]).copy())
        return weight.reshape(tile).to(self._layout.device)


def evaluate_together(many: Sequence[LogitRows]) -> None:
    """Evaluate all tiles of several images, which share batches across their borders.

    Args:
        many: Images for the same networks, mirrored alike, whose sums are held whole.

    Raises:
        StoppedError: If somebody asked to stop.
    """
    first = many[0]
    runner, batch = first._runner, first._batch
    tiles = [(rows, box) for rows in many for box in rows._boxes]
    with torch.inference_mode(), evaluating(runner.networks):
        for start in range(0, len(tiles), batch):
            if first._should_stop():
                raise StoppedError
            part = tiles[start : start + batch]
            sums = [rows._started() for rows, _ in part]
            cut = [
                rows._volume.cut([box], runner.device, runner.num_previous) for rows, box in part
            ]
            logits = runner.run(torch.cat(cut), batch)
            for (rows, box), own, values in zip(part, sums, logits, strict=True):
                rows._take(own, box, values)


def batch_rows(volume: Volume, layout: Layout) -> int:
    """Return how many rows the tiles of one batch may span: slices of 2D go together."""
    tile = volume.tile[layout.axis]
    return max(tile, layout.batch) if volume.is_2d and layout.axis == 0 else tile


def _starts(shape: Sequence[int], tile: Sequence[int], step: float) -> list[tuple[int, ...]]:
    return [
        tile_starts(length, size, step) if size > 1 else tuple(range(length))
        for length, size in zip(shape, tile, strict=True)
    ]


def tile_boxes(volume: Volume, step: float, axis: int = 0) -> list[Box]:
    """Return every tile, those with the first rows of an axis first."""
    starts = _starts(volume.shape, volume.tile, step)
    boxes = []
    for a, b, c in product(*starts):
        t0, t1, t2 = volume.tile
        boxes.append((slice(a, a + t0), slice(b, b + t1), slice(c, c + t2)))
    return sorted(boxes, key=lambda box: box[axis].start)
