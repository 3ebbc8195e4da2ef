"""What happens to one batch of tiles: mirrors x networks -> logits.

Shape letters: B tiles of a batch, C image channels, L logit channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import nn

Order = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """How one batch of tiles becomes logits."""

    networks: tuple[nn.Module, ...]
    """One per fold, on `device`; one that returns a list (deep supervision) gives its first."""
    flips: tuple[tuple[int, ...], ...]
    """Axes of the tile that each pass mirrors."""
    channels: tuple[torch.Tensor | None, ...]
    """For each pass the channel that each logit channel is read from; None: its own."""
    inputs: tuple[torch.Tensor | None, ...]
    """The same for the channels of the networks' input."""
    num_logits: int
    num_previous: int
    """Channels for what the stage before found, after those of the image."""
    device: torch.device
    dtype: torch.dtype | None
    """Autocast type; None computes in float32."""
    has_regions: bool = False
    averages_probabilities: bool = False
    """Whether each pass is activated before anything is averaged: its logits are probabilities."""
    measures_disagreement: bool = False
    """Whether one more channel tells, for each voxel, the share of networks whose own decision
    differs from that of their mean."""

    @property
    def num_channels(self) -> int:
        """Return how many channels `run` gives: the logits, and the disagreement if measured."""
        return self.num_logits + self.measures_disagreement

    @property
    def num_passes(self) -> int:
        """Return how many times the networks see each tile."""
        return len(self.flips) * len(self.networks)

    def ends(self) -> Runner:
        """Return the same with the first and the last mirroring alone, which are farthest apart."""
        chosen = sorted({0, len(self.flips) - 1})
        return replace(
            self,
            flips=tuple(self.flips[number] for number in chosen),
            channels=tuple(self.channels[number] for number in chosen),
            inputs=tuple(self.inputs[number] for number in chosen),
        )

    def run(self, tiles: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the mean logits of a batch.

        Args:
            tiles: (B, C + num_previous, *tile) on `device`.
            batch: Most images a network is given at once; mirrored tiles share a batch.

        Returns:
            (B, num_channels, *tile); float32, or the networks' own type where there is one pass.
        """
        votes: list[torch.Tensor] = []
        total: torch.Tensor | None = None
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            for network in self.networks:
                found = self._mirrored(network, tiles, batch)
                if self.measures_disagreement:
                    votes.append(self.decision(found, len(self.flips)))
                total = found if total is None else total.add_(found)
        if total is None:
            raise ValueError("at least one network is needed, got none")
        if self.measures_disagreement:
            share = disagreement(votes, self.decision(total, self.num_passes))
            total = torch.cat([total.float().mul_(1 / self.num_passes), share[:, None]], dim=1)
            return total
        return total if self.num_passes == 1 else total.mul_(1 / self.num_passes)

    def _mirrored(self, network: nn.Module, tiles: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the sum over all mirrorings of one network's logits."""
        total: torch.Tensor | None = None
        together = max(1, batch // len(tiles))
        for start in range(0, len(self.flips), together):
            passes = range(start, min(start + together, len(self.flips)))
            images = [self._mirror(tiles, number) for number in passes]
            output = network(images[0] if len(images) == 1 else torch.cat(images))
            logits = output[0] if isinstance(output, (list, tuple)) else output
            self._check(logits)
            logits = self._activated(logits)
            for number, part in zip(passes, torch.split(logits, len(tiles)), strict=True):
                part = self._restore(part, number)
                if self.num_passes == 1:
                    return part
                total = part.to(torch.float32, copy=True) if total is None else total.add_(part)
        if total is None:
            raise ValueError("at least one mirroring is needed, got none")
        return total

    def _mirror(self, tiles: torch.Tensor, number: int) -> torch.Tensor:
        dims, inputs = self._dims(number), self.inputs[number]
        tiles = torch.flip(tiles, dims) if dims else tiles
        return tiles if inputs is None else tiles.index_select(1, inputs)

    def _restore(self, logits: torch.Tensor, number: int) -> torch.Tensor:
        dims, channels = self._dims(number), self.channels[number]
        logits = torch.flip(logits, dims) if dims else logits
        return logits if channels is None else logits.index_select(1, channels)

    def _dims(self, number: int) -> list[int]:
        return [axis + 2 for axis in self.flips[number]]

    def _activated(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what is averaged."""
        if not self.averages_probabilities:
            return logits
        return logits.float().sigmoid() if self.has_regions else logits.float().softmax(dim=1)

    def decision(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """Return what a sum of logits stands for: (B, *tile) channel, or (B, R, *tile) yes or no.

        Args:
            logits: (B, L, *tile).
            count: Passes in the sum.
        """
        if self.has_regions:
            return logits > (0.5 * count if self.averages_probabilities else 0)
        return logits.argmax(dim=1).to(torch.int16)

    def _check(self, logits: torch.Tensor) -> None:
        if logits.shape[1] != self.num_logits:
            raise ValueError(
                f"networks return {tuple(logits.shape)}; expected (B, {self.num_logits}, *tile)"
            )


def disagreement(votes: Sequence[torch.Tensor], consensus: torch.Tensor) -> torch.Tensor:
    """Return (B, *tile): the share of votes that differ from the consensus, in any region."""
    differing = torch.stack([vote != consensus for vote in votes])
    if consensus.dtype == torch.bool:
        differing = differing.any(dim=2)
    return differing.float().mean(dim=0)


@contextmanager
def evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put networks into evaluation mode; those that were training return to it."""
    training = [part for network in networks for part in network.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


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
) -> tuple[Order | None, ...]:
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
) -> tuple[Order | None, ...]:
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


def make_runner(  # noqa: PLR0913 - all but the networks by keyword
    networks: Sequence[nn.Module],
    *,
    num_channels: int,
    num_logits: int,
    num_previous: int = 0,
    mirror_axes: Sequence[int] = (),
    swap_axes: Sequence[int] = (),
    swaps: Sequence[tuple[int, int]] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    has_regions: bool = False,
    averages_probabilities: bool = False,
    measures_disagreement: bool = False,
) -> Runner:
    """Return how batches of tiles become logits.

    Args:
        networks: On `device`, one per fold.
        num_channels: Channels of the image (C).
        num_logits: Channels the networks return (L).
        num_previous: Channels for what the stage before found.
        mirror_axes: Axes of the tile that are mirrored, in all combinations.
        swap_axes: Axes of the tile whose mirroring exchanges left and right.
        swaps: Pairs of channels, left and right form of the same thing, that change places in the
            logits of an image whose left and right were exchanged.
        device: Where the networks are.
        dtype: Autocast type of the networks; None computes in float32.
        has_regions: Whether each channel decides on its own.
        averages_probabilities: See `Runner`.
        measures_disagreement: See `Runner`.

    Raises:
        ValueError: If `swaps` are no pairs of channels.
    """
    swapped = [channel for pair in swaps for channel in pair]
    if len(set(swapped)) < len(swapped) or not set(swapped) <= set(range(num_logits)):
        raise ValueError(
            f"swaps must be pairs of the {num_logits} channels, each in one pair, got {swaps}"
        )
    flips, target = mirror_subsets(mirror_axes), torch.device(device)
    orders = swapped_channels(flips, num_logits, swap_axes=swap_axes, swaps=swaps)
    return Runner(
        networks=tuple(networks),
        flips=flips,
        channels=_on(target, orders),
        inputs=_on(target, swapped_inputs(orders, num_channels, num_previous)),
        num_logits=num_logits,
        num_previous=num_previous,
        device=target,
        dtype=dtype,
        has_regions=has_regions,
        averages_probabilities=averages_probabilities,
        measures_disagreement=measures_disagreement and len(networks) > 1,
    )


def _on(
    device: torch.device, orders: Sequence[Sequence[int] | None]
) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if order is None else torch.tensor(order, device=device) for order in orders)
