"""The label of every voxel of a slab, without resampling what is plain.

Linear resampling gives each voxel a mixture of its neighbours' logits. Where all of them decide
alike, so does every mixture; only voxels whose neighbours differ, near borders, are computed.

Shape letters: L logit channels, N voxels that are computed, P corners around a voxel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.labels import LabelScheme
from medseg.resample import Slab

Codes = torch.Tensor
"""What logits decide: the largest channel; with regions 1 + the last one that is there, or 0."""
DENSE_SHARE = 0.1
"""Where more than this share of a slab is near a border, all of it is computed."""
CHUNK = 2**17
"""Voxels computed at once."""


def segment_slab(
    slab: Slab, labels: LabelScheme, threshold: float = 0.0
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label indices of a slab of resampled logits.

    Args:
        slab: Logits and the rows asked for.
        labels: What the L channels mean.
        threshold: Above it a region is there: 0 for logits, 0.5 for probabilities.

    Returns:
        (*slab.shape_out) indices: with labels the largest logit wins, the smallest index among
        equals; with regions those above the threshold are painted in order.
    """
    channels = len(slab.logits)
    if channels != labels.num_logits:
        raise ValueError(f"expected {labels.num_logits} logit channels, got {channels}")
    decided = decide(iter(slab.logits), labels, threshold)
    if not slab.is_resized:
        first = slab.rows.start - slab.held.start
        own = decided.narrow(slab.axis, first, slab.rows.stop - slab.rows.start)
        return indices_of(own, labels)
    lowest, highest = _extremes(slab, decided)
    mixed = torch.nonzero((lowest != highest).reshape(-1)).squeeze(1)
    if len(mixed) > DENSE_SHARE * lowest.numel():
        return indices_of(decide(slab.channels(), labels, threshold), labels)
    flat = lowest.reshape(-1)
    for points in torch.split(mixed, CHUNK):
        flat[points] = decide(_mixtures(slab, points), labels, threshold)
    return indices_of(lowest, labels)


def decide(channels: Iterable[torch.Tensor], labels: LabelScheme, threshold: float = 0.0) -> Codes:
    """Return what logits decide, one channel at a time.

    Args:
        channels: L tensors of one shape.
        labels: Whether they are labels or regions.
        threshold: Above it a region is there.

    Returns:
        Codes of that shape, of the smallest type that holds them.
    """
    kind = torch.uint8 if labels.num_logits < 256 else torch.int32
    if labels.has_regions:
        return _last_above(channels, threshold, kind)
    code: torch.Tensor | None = None
    best: torch.Tensor | None = None
    for number, values in enumerate(channels):
        if best is None or code is None:
            best, code = values.clone(), torch.zeros(values.shape, dtype=kind, device=values.device)
            continue
        is_better = torch.gt(values, best)
        torch.maximum(code, is_better.to(kind).mul_(number), out=code)  # numbers only grow
        torch.maximum(best, values, out=best)
    if code is None:
        raise ValueError("there are no logits")
    return code


def _last_above(channels: Iterable[torch.Tensor], threshold: float, kind: torch.dtype) -> Codes:
    code: torch.Tensor | None = None
    for number, values in enumerate(channels, start=1):
        painted = (values > threshold).to(kind).mul_(number)
        code = painted if code is None else torch.maximum(code, painted, out=code)
    if code is None:
        raise ValueError("there are no logits")
    return code


def indices_of(codes: Codes, labels: LabelScheme) -> NDArray[np.unsignedinteger[Any]]:
    """Return the label indices that codes stand for."""
    found = codes.cpu().numpy()
    if not labels.has_regions:
        return found.astype(labels.index_dtype, copy=False)
    painted = np.array((0, *labels.regions_order_indices), dtype=labels.index_dtype)
    indices: NDArray[np.unsignedinteger[Any]] = painted[found]
    return indices


def _extremes(slab: Slab, decided: Codes) -> tuple[Codes, Codes]:
    """Return the lowest and the highest code around every voxel of the slab."""
    lowest = highest = decided
    for axis in slab.order:
        indices = [index for index, _ in slab.taps(axis)]
        lowest = reduce(torch.minimum, [lowest.index_select(axis, index) for index in indices])
        highest = reduce(torch.maximum, [highest.index_select(axis, index) for index in indices])
    return lowest, highest


def _mixtures(slab: Slab, points: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield each channel at some voxels of the slab, (N).

    Args:
        slab: Logits.
        points: (N) flat indices into the slab.
    """
    corners, shares = _corners(slab, points)
    for channel in slab.logits:
        flat = channel.reshape(-1)
        total = flat[corners[0]].mul_(shares[0])
        for corner, share in zip(corners[1:], shares[1:], strict=True):
            total.addcmul_(flat[corner], share)
        yield total


def _places(points: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """Return the index along each axis of flat indices; `torch.unravel_index` imports for 0.4 s."""
    places = []
    for length in reversed(shape):
        places.append(points % length)
        points = torch.div(points, length, rounding_mode="floor")
    return places[::-1]


def _corners(slab: Slab, points: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return P flat indices into a channel and P weights, (N) each."""
    shape, held = slab.shape_out, tuple(slab.logits.shape[1:])
    places = _places(points, shape)
    options = []
    for axis, place in enumerate(places):
        taps = slab.taps(axis) if axis in slab.order else []
        plain = [(taps[0][0][place] if taps else place, None)]
        options.append(
            plain if len(taps) < 2 else [(i[place], weight[place]) for i, weight in taps]
        )
    corners, shares = [], []
    for chosen in product(*options):
        flat = torch.zeros_like(points)
        share = torch.ones(points.shape, device=points.device)
        for length, (index, weight) in zip(held, chosen, strict=True):
            flat = flat * length + index
            share = share if weight is None else share * weight
        corners.append(flat)
        shares.append(share)
    return corners, shares
