"""How much memory a prediction takes, told before the network runs, and where its sums are kept.

The logits of all classes at the network's resolution are what grows with the image. They are held
whole where there is room, else as a window of rows that passes along one axis, else as a window in
a scratch file.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from medseg.errors import ConfigError
from medseg.execute.resources import free_memory_bytes, resident_bytes
from medseg.execute.sizes import size_words
from medseg.infer.export import SLAB_ELEMENTS, slab_rows
from medseg.infer.rows import Layout
from medseg.schema.plans import Architecture

logger = logging.getLogger(__name__)

FREE_SHARE = 0.8
"""Part of the free memory that is taken where no limit was given."""
GPU_SHARE = 0.9
"""Part of the free memory of a GPU, or of the limit, that is counted on."""
SLAB_COPIES = 6
"""Working arrays of export, each as large as the logits of a slab."""
LIVE_TENSORS = 4
"""Feature maps of full resolution that are alive at once in a network's forward pass."""
KINDS = ("whole", "window", "file")
"""Ways of holding the sums, the quickest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a prediction may take, in bytes; None: what is free."""

    memory_bytes: int | None = None
    """Resident memory of the whole process."""
    vram_bytes: int | None = None
    """Memory of the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One model's part of a prediction, as far as its memory goes."""

    shape: tuple[int, int, int]
    """(n0, n1, n2) of the preprocessed image, padded to hold a tile."""
    shape_network: tuple[int, int, int]
    """The same without padding."""
    axes: tuple[int, int, int]
    """Network axis d is image axis `axes[d]`."""
    shape_cropped: tuple[int, int, int]
    """What the image has in network order, before it was resampled."""
    tile: tuple[int, int, int]
    """A tile of a 2D configuration is one slice thick."""
    is_2d: bool
    num_inputs: int
    num_channels: int
    """Logits, and the channel of disagreement if there is one."""
    features: int
    """Features of the network at full resolution."""
    num_passes: int
    batch: int
    """Images a network is given at once."""
    value_bytes: int
    """Bytes of a number in the network's arithmetic."""

    def window(self, axis: int, slab: int) -> int:
        """Return how many rows a window needs along one axis.

        Args:
            axis: Network axis.
            slab: Rows that export takes at once.
        """
        own = max(self.tile[axis], self.batch) if self.is_2d and axis == 0 else self.tile[axis]
        return min(self.shape[axis], own + slab + 2)

    def sums_bytes(self, axis: int, rows: int) -> int:
        """Return the bytes of some rows of sums, without those of the weights."""
        return 4 * self.num_channels * math.prod(self.shape) // self.shape[axis] * rows

    def weight_bytes(self, axis: int, rows: int) -> int:
        """Return the bytes of the summed weights of some rows."""
        return 4 * math.prod(self.shape) // self.shape[axis] * rows

    @property
    def network_bytes(self) -> int:
        """Return roughly what a forward pass takes beside the weights."""
        voxels = math.prod(self.tile) * self.batch
        values = voxels * (self.num_inputs + LIVE_TENSORS * self.features + self.num_channels)
        sums = voxels * self.num_channels * 4 if self.num_passes > 1 else 0
        return values * self.value_bytes + sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What export makes of all models' logits."""

    shape_image: tuple[int, int, int]
    num_logits: int
    label_bytes: int
    """Bytes of one voxel of the segmentation."""
    map_bytes: int = 0
    """Bytes of the maps that are returned in memory, whole."""
    num_models: int = 1

    @property
    def kept_bytes(self) -> int:
        """Return what is there until the end: the segmentation, and maps in memory."""
        return math.prod(self.shape_image) * self.label_bytes + self.map_bytes

    def slab_bytes(self, image_axis: int) -> int:
        """Return what the slabs take where one axis of the image is cut."""
        row = self.num_logits * math.prod(self.shape_image) // self.shape_image[image_axis]
        slab = max(row, min(SLAB_ELEMENTS, row * self.shape_image[image_axis]))
        return 4 * slab * (SLAB_COPIES + self.num_models - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Where each model's sums are kept."""

    layouts: tuple[Layout, ...]
    need_bytes: int
    """What the process will hold at most, as far as can be told."""
    words: str
    """The plan, in words."""
    is_plain: bool
    """Whether everything is held whole in memory."""


def arrange(
    requests: Sequence[Request],
    export: Export,
    limits: Limits,
    device: torch.device,
    *,
    preferred: int = 2,
    preference: float = 1.01,
) -> Arrangement:
    """Choose where the sums of all models are kept, so that everything fits.

    Args:
        requests: One per model.
        export: What is made of their logits.
        limits: What may be taken.
        device: Where the networks are.
        preferred: Image axis that is cut unless another one's windows are smaller.
        preference: How many times smaller.

    Raises:
        ConfigError: If it fits in no way, with the least it takes.
    """
    axes = _image_axes(requests, export, preferred, preference)
    if device.type == "cuda":
        requests = [
            _with_smaller_batch(request, _gpu_bytes(limits, device)) for request in requests
        ]
        found = _on_gpu(requests, export, limits, device, axes)
        if found is not None:
            return found
    return _on_host(requests, export, limits, axes, on_cpu=device.type != "cuda")


def _on_gpu(
    requests: Sequence[Request],
    export: Export,
    limits: Limits,
    device: torch.device,
    axes: Sequence[int],
) -> Arrangement | None:
    """Return how everything fits beside the networks; None where it does not."""
    room = _gpu_bytes(limits, device)
    resident, total = _taken_and_total(limits)
    for kind, axis in itertools.product(("whole", "window"), axes):
        found = _try(requests, export, axis, kind)
        images = sum(4 * r.num_inputs * math.prod(r.shape) for r in requests)
        network = max(request.network_bytes for request in requests)
        on_gpu = network + images + found.sums + found.weights + export.slab_bytes(axis)
        need = resident + export.kept_bytes
        if kind in KINDS and on_gpu <= room and need <= total:
            return _arrangement(requests, found, need, kind, device)
    return None


def _on_host(
    requests: Sequence[Request],
    export: Export,
    limits: Limits,
    axes: Sequence[int],
    *,
    on_cpu: bool,
) -> Arrangement:
    """Return how everything fits into main memory.

    Raises:
        ConfigError: If it does not.
    """
    resident, total = _taken_and_total(limits)
    base = resident + (sum(r.network_bytes for r in requests) if on_cpu else 0)
    least: int | None = None
    for kind, axis in itertools.product(KINDS, axes):
        found = _try(requests, export, axis, kind)
        need = base + found.weights + export.slab_bytes(axis) + export.kept_bytes
        need += 0 if kind == "file" else found.sums
        least = need if least is None else min(least, need)
        if need <= total:
            return _arrangement(requests, found, need, kind, torch.device("cpu"))
    advice = "Close other programs, or predict on a machine with more memory."
    raise ConfigError(
        f"this image needs at least {size_words(least or 0)} of memory ({size_words(resident)} are "
        f"taken now), {size_words(total)} may be taken. "
        + ("Raise --max-memory (max_memory in Python)." if limits.memory_bytes else advice)
    )


def _taken_and_total(limits: Limits) -> tuple[int, int]:
    """Return what the process holds and what it may hold, in bytes."""
    resident = resident_bytes()
    return resident, limits.memory_bytes or resident + int(FREE_SHARE * free_memory_bytes())


def _gpu_bytes(limits: Limits, device: torch.device) -> int:
    """Return what may still be taken of a GPU: blocks that torch keeps for later count as free."""
    taken = torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - taken
    if limits.vram_bytes is not None:
        free = min(free, max(0, limits.vram_bytes - taken))
    return int(GPU_SHARE * free)


def _with_smaller_batch(request: Request, room: int) -> Request:
    """Return the request with the largest batch whose forward pass takes half of the room."""
    batch = request.batch
    while batch > 1 and replace(request, batch=batch).network_bytes > room / 2:
        batch = (batch + 1) // 2
    return replace(request, batch=batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    image_axis: int
    windows: tuple[int | None, ...]
    sums: int
    """Bytes of all sums."""
    weights: int
    """Bytes of the summed weights of tiles."""


def _try(requests: Sequence[Request], export: Export, image_axis: int, kind: str) -> _Tried:
    windows: list[int | None] = []
    sums = weights = 0
    for request in requests:
        axis = request.axes.index(image_axis)
        slab = slab_rows(
            export.shape_image, image_axis, export.num_logits, [request.shape_network], [axis]
        )
        ratio = request.shape_network[axis] / request.shape_cropped[axis]
        rows = request.window(axis, math.ceil(slab * ratio))
        rows = request.shape[axis] if kind == "whole" else rows
        windows.append(None if kind == "whole" else rows)
        sums += request.sums_bytes(axis, rows)
        weights += request.weight_bytes(axis, rows)
    return _Tried(image_axis=image_axis, windows=tuple(windows), sums=sums, weights=weights)


def _image_axes(
    requests: Sequence[Request], export: Export, preferred: int, preference: float
) -> list[int]:
    """Return the axes that may be cut, the one with the smallest windows first."""
    cost = {axis: _try(requests, export, axis, "window").sums for axis in range(3)}
    return sorted(range(3), key=lambda axis: cost[axis] * (1 if axis == preferred else preference))


def _arrangement(
    requests: Sequence[Request], found: _Tried, need: int, kind: str, home: torch.device
) -> Arrangement:
    layouts = tuple(
        Layout(
            axis=request.axes.index(found.image_axis),
            window=window,
            device=home,
            in_file=kind == "file",
            batch=request.batch,
        )
        for request, window in zip(requests, found.windows, strict=True)
    )
    where = "on the GPU" if home.type == "cuda" else "in memory"
    held = {
        "whole": f"held whole {where} ({size_words(found.sums)})",
        "window": f"held {max(w or 0 for w in found.windows)} rows at a time {where} "
        f"({size_words(found.sums)})",
        "file": f"held {max(w or 0 for w in found.windows)} rows at a time in a scratch file "
        f"({size_words(found.sums)})",
    }[kind]
    return Arrangement(
        layouts=layouts,
        need_bytes=need,
        words=f"logits {held}, about {size_words(need)} of memory in all",
        is_plain=kind == "whole",
    )


def features_of(architecture: Architecture) -> int:
    """Return the features of a network at full resolution."""
    return architecture.features[0] if architecture.features else 32
