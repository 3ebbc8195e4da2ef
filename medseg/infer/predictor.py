"""Sliding-window prediction: tiles x mirrors x networks -> logits of one preprocessed image.

Shape letters: B tiles of a batch, C image channels, L logit channels, n0 n1 n2 network axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from medseg.augment.previous import one_hot
from medseg.errors import BundleError
from medseg.infer.tiles import Index, importance, padding, tile_indices

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Pass:
    """How one batch of tiles becomes logits."""

    networks: tuple[nn.Module, ...]
    flips: tuple[tuple[int, ...], ...]
    channels: tuple[torch.Tensor | None, ...]
    """For each flip the channel that each channel is read from; None: its own."""
    inputs: tuple[torch.Tensor | None, ...]
    """The same for the channels of the networks' input."""
    num_logits: int
    num_previous: int
    device: torch.device
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Volume:
    """What the tiles are cut from, padded to hold one."""

    image: torch.Tensor
    """(C, n0, n1, n2)."""
    previous: torch.Tensor | None
    """(n0, n1, n2)."""
    tile: tuple[int, ...]
    indices: list[Index]

    def to(self, device: torch.device) -> _Volume:
        """Return the same on a device."""
        previous = None if self.previous is None else self.previous.to(device)
        return replace(self, image=self.image.to(device), previous=previous)

    def cut(self, batch: Sequence[Index], device: torch.device, num_previous: int) -> torch.Tensor:
        """Return tiles (B, C + num_previous, *tile) on a device."""
        tiles = torch.stack([self.image[(slice(None), *index)] for index in batch])
        tiles = tiles.to(device, non_blocking=True)
        if self.previous is None:
            return tiles
        found = torch.stack([self.previous[index] for index in batch])
        found = found.to(device, non_blocking=True)
        return torch.cat([tiles, one_hot(found, num_previous)], dim=1)


def mirror_subsets(mirror_axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return every subset of the mirrored axes, the empty one (no mirroring) first.

    Examples:
        >>> mirror_subsets((0, 2))
        ((), (0,), (2,), (0, 2))
    """
    axes = tuple(sorted(set(mirror_axes)))
    return tuple(subset for count in range(len(axes) + 1) for subset in combinations(axes, count))


def swapped_channels(
    flips: Sequence[Sequence[int]],
    num_logits: int,
    *,
    swap_axes: Sequence[int],
    swaps: Sequence[tuple[int, int]],
) -> tuple[tuple[int, ...] | None, ...]:
    """Return, for each mirroring, which channel each channel is read from; None: its own.

    Left and right change places where an odd number of `swap_axes` is mirrored.

    Examples:
        >>> swapped_channels([(), (0,), (0, 1)], 4, swap_axes=(0,), swaps=[(1, 3)])
        (None, (0, 3, 2, 1), (0, 3, 2, 1))
    """
    partner = {a: b for pair in swaps for a, b in (pair, pair[::-1])}
    order = tuple(partner.get(channel, channel) for channel in range(num_logits))
    is_odd = [sum(axis in swap_axes for axis in axes) % 2 == 1 for axes in flips]
    return tuple(order if partner and odd else None for odd in is_odd)


def swapped_inputs(
    orders: Sequence[Sequence[int] | None], num_channels: int, num_previous: int
) -> tuple[tuple[int, ...] | None, ...]:
    """Return, for each mirroring, which input channel each input channel is read from.

    Where logits change places, so do the channels of what the stage before found: an image whose
    left and right were exchanged shows the left structure at the place of the right one.

    Args:
        orders: What `swapped_channels` returned.
        num_channels: Channels of the image, which come first.
        num_previous: Channels of the indices 1, 2 ... of the stage before.

    Examples:
        >>> swapped_inputs([None, (0, 3, 2, 1)], 2, 3)
        (None, (0, 1, 4, 3, 2))
    """
    own = tuple(range(num_channels))
    return tuple(
        None
        if order is None or not num_previous
        else own + tuple(num_channels + index - 1 for index in order[1 : num_previous + 1])
        for order in orders
    )


def predict_logits(  # noqa: PLR0913 - the whole recipe of a prediction, all but three by keyword
    networks: Sequence[nn.Module],
    image: torch.Tensor,
    tile: tuple[int, ...],
    *,
    num_logits: int,
    previous: torch.Tensor | None = None,
    num_previous: int = 0,
    mirror_axes: Sequence[int] = (),
    swap_axes: Sequence[int] = (),
    swaps: Sequence[tuple[int, int]] = (),
    step: float = 0.5,
    tile_batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Predict an image in overlapping tiles.

    The logits of a voxel are the mean over networks and mirrorings, and the Gaussian-weighted mean
    over the tiles that hold it. Sums are float32 whatever the arithmetic of the network. An image
    smaller than the tile is padded with zeros, which are cut off again.

    Args:
        networks: Networks on `device`, one per fold; they are put into evaluation mode for the
            call. A network that returns a list (deep supervision) gives its first entry.
        image: Preprocessed image (C, n0, n1, n2), float32, on any device.
        tile: Tile size in voxels; two entries for a 2D configuration, which runs on the slices
            along network axis 0.
        num_logits: Channels the networks return (L).
        previous: (n0, n1, n2) label indices that the stage before found, in a cascade; the networks
            take them after the image as `num_previous` channels, one for each index from 1.
        num_previous: How many indices that are.
        mirror_axes: Axes of the tile that are mirrored, in all combinations.
        swap_axes: Axes of the tile whose mirroring exchanges left and right.
        swaps: Pairs of channels, left and right form of the same thing, that change places in the
            logits of an image whose left and right were exchanged.
        step: Largest shift between tiles, as a fraction of the tile in (0, 1].
        tile_batch: Tiles evaluated at once.
        device: Where the networks are.
        dtype: Autocast type of the networks; None computes in float32.
        progress: Called with (tiles done, tiles in total) after every batch.

    Returns:
        Logits (L, n0, n1, n2), float32, on the CPU.

    Raises:
        ValueError: If shapes, axes or numbers do not fit together.
        BundleError: If the networks return values that are not finite, in float32 too.

    Source:
        Behaviour of nnU-Net v2's predictor, with float32 in place of its float16 sums.
    """
    _check(networks, image, tile, mirror_axes, tile_batch)
    _check_swaps(tile, num_logits, swap_axes, swaps)
    _check_previous(image, previous, num_previous)
    flips, target = mirror_subsets(mirror_axes), torch.device(device)
    orders = swapped_channels(flips, num_logits, swap_axes=swap_axes, swaps=swaps)
    run = _Pass(
        networks=tuple(networks),
        flips=flips,
        channels=_on(target, orders),
        inputs=_on(target, swapped_inputs(orders, image.shape[0], num_previous)),
        num_logits=num_logits,
        num_previous=num_previous,
        device=target,
        dtype=dtype,
    )
    lacks = padding(image.shape[1:], tile)
    padded = _padded(image, lacks)
    before = None if previous is None else _padded(previous, lacks)
    indices = tile_indices(padded.shape[1:], tile, step)
    volume = _Volume(padded, before, tile, indices)
    with torch.inference_mode(), _evaluating(run.networks):
        logits = _finite(run, volume, tile_batch, progress)
    inner = tuple(
        slice(before, before + length)
        for (before, _), length in zip(lacks, image.shape[1:], strict=True)
    )
    return logits[(slice(None), *inner)].contiguous().cpu()


def _check(
    networks: Sequence[nn.Module],
    image: torch.Tensor,
    tile: tuple[int, ...],
    mirror_axes: Sequence[int],
    tile_batch: int,
) -> None:
    if not networks:
        raise ValueError("at least one network is needed, got none")
    if image.ndim != 4 or image.dtype != torch.float32:
        raise ValueError(
            f"image must be float32 (C, n0, n1, n2), got {image.dtype} {tuple(image.shape)}"
        )
    if not torch.isfinite(image.sum()):
        raise ValueError("image holds values that are not finite")
    if len(tile) not in (2, 3) or min(tile) < 1:
        raise ValueError(f"tile must have 2 or 3 positive entries, got {tile}")
    if any(not 0 <= axis < len(tile) for axis in mirror_axes):
        raise ValueError(f"mirror_axes must be axes of the tile {tile}, got {tuple(mirror_axes)}")
    if tile_batch < 1:
        raise ValueError(f"tile_batch must be at least 1, got {tile_batch}")


def _check_swaps(
    tile: tuple[int, ...],
    num_logits: int,
    swap_axes: Sequence[int],
    swaps: Sequence[tuple[int, int]],
) -> None:
    if any(not 0 <= axis < len(tile) for axis in swap_axes):
        raise ValueError(f"swap_axes must be axes of the tile {tile}, got {tuple(swap_axes)}")
    swapped = [channel for pair in swaps for channel in pair]
    if len(set(swapped)) < len(swapped) or not set(swapped) <= set(range(num_logits)):
        raise ValueError(
            f"swaps must be pairs of the {num_logits} channels, each in one pair, got {swaps}"
        )


def _check_previous(image: torch.Tensor, previous: torch.Tensor | None, num_previous: int) -> None:
    if (previous is None) != (num_previous == 0):
        found = "nothing" if previous is None else "a label map"
        raise ValueError(f"num_previous is {num_previous}, the stage before gave {found}")
    if previous is not None and (previous.is_floating_point() or previous.shape != image.shape[1:]):
        raise ValueError(
            f"previous must hold integers of shape {tuple(image.shape[1:])}, got {previous.dtype} "
            f"{tuple(previous.shape)}"
        )


def _padded(array: torch.Tensor, lacks: Sequence[tuple[int, int]]) -> torch.Tensor:
    return functional.pad(array, [amount for pair in reversed(lacks) for amount in pair])


def _on(
    device: torch.device, orders: Sequence[Sequence[int] | None]
) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if order is None else torch.tensor(order, device=device) for order in orders)


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put networks into evaluation mode; those that were training return to it."""
    training = [part for network in networks for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _finite(
    run: _Pass, volume: _Volume, tile_batch: int, progress: Progress | None
) -> torch.Tensor:
    """Return what `_accumulate` does, repeated in float32 if the autocast type overflowed."""
    logits = _accumulate(run, volume, tile_batch, progress)
    if torch.isfinite(logits.sum()):
        return logits
    if run.dtype is not None:
        logger.warning("the network overflowed in %s; predicting again in float32", run.dtype)
        return _finite(replace(run, dtype=None), volume, tile_batch, progress)
    raise BundleError(
        "the network returned values that are not finite (NaN or infinity) for a finite image; "
        "the weights are unusable. Use another checkpoint or train again."
    )


def _accumulate(
    run: _Pass, volume: _Volume, tile_batch: int, progress: Progress | None
) -> torch.Tensor:
    """Return the weighted mean of all tiles (L, n0, n1, n2), on the device that holds the sums."""
    shape, tile, indices = tuple(volume.image.shape[1:]), volume.tile, volume.indices
    home = _home(run, volume.image)
    volume = volume.to(home)
    with torch.inference_mode(mode=False):  # an ordinary tensor, whatever is done with it later
        total = torch.zeros((run.num_logits, *shape), device=home)
    windows = len(indices) if len(tile) == 3 else len(indices) // shape[0]
    weight = torch.from_numpy(importance(tile).copy() if windows > 1 else _ones(tile)).to(home)
    for start in range(0, len(indices), tile_batch):
        batch = indices[start : start + tile_batch]
        logits = _run(run, volume.cut(batch, run.device, run.num_previous)).to(home)
        for index, values in zip(batch, logits, strict=True):
            total[(slice(None), *index)] += values * weight
        if progress is not None:
            progress(min(start + tile_batch, len(indices)), len(indices))
    if windows > 1:
        total /= _weight_sum(shape, tile, indices, weight)
    return total


def _ones(tile: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ones(tile, dtype=np.float32)


def _weight_sum(
    shape: tuple[int, ...], tile: tuple[int, ...], indices: list[Index], weight: torch.Tensor
) -> torch.Tensor:
    """Return the sum of tile weights at each voxel; slices of a 2D configuration share theirs."""
    leading = len(shape) - len(tile)
    total = torch.zeros(shape[leading:], device=weight.device)
    for index in indices:
        if index[:leading] == (0,) * leading:
            total[index[leading:]] += weight
    return total


def _home(run: _Pass, image: torch.Tensor) -> torch.device:
    """Return where image and sums are kept: beside the network if its memory holds them twice."""
    if run.device.type != "cuda":
        return run.device
    needed = 4 * (run.num_logits + image.shape[0] + 1) * image[0].numel()
    free, _ = torch.cuda.mem_get_info(run.device)
    if 2 * needed < free:
        return run.device
    logger.info("sums of %.1f GB stay in main memory: %s has %.1f GB free",
                needed / 1e9, run.device, free / 1e9)  # fmt: skip
    return torch.device("cpu")


def _run(run: _Pass, tiles: torch.Tensor) -> torch.Tensor:
    """Return the mean logits of a batch (B, C, *tile) -> float32 (B, L, *tile)."""
    total: torch.Tensor | None = None
    autocast = torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None)
    with autocast:
        for axes, channels, inputs in zip(run.flips, run.channels, run.inputs, strict=True):
            dims = [axis + 2 for axis in axes]
            mirrored = torch.flip(tiles, dims) if dims else tiles
            if inputs is not None:
                mirrored = mirrored.index_select(1, inputs)
            for network in run.networks:
                output = network(mirrored)
                logits = output[0] if isinstance(output, (list, tuple)) else output
                logits = torch.flip(logits.float(), dims) if dims else logits.float()
                if channels is not None:
                    logits = logits.index_select(1, channels)
                total = logits if total is None else total + logits
    if total is None or total.shape[1] != run.num_logits:
        found = None if total is None else tuple(total.shape)
        raise ValueError(f"networks return {found}; expected (B, {run.num_logits}, *tile)")
    return total / (len(run.flips) * len(run.networks))
