"""From logits in the network frame to results on the image's own grid, slab by slab.

Several models advance together along one axis of the image; nothing of full size is held but the
label map, whatever the number of classes.

Shape letters: L logit channels, n0 n1 n2 network axes, I J K axes of the image as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.geometry import SpatialRecord
from medseg.infer.maps import NO_MAPS, ArrayMaps, Maps, entropy, put_slab, within
from medseg.infer.parts import Held, Part, result_axis
from medseg.infer.segment import decide, indices_of, segment_slab
from medseg.labels import LabelScheme
from medseg.resample import Slab, rows_needed
from medseg.values import value_counts

SLAB_ELEMENTS = 2**24
"""Largest number of logits resampled at once: what export needs beyond its input and output."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reduced:
    """What logits became."""

    segmentation: NDArray[np.integer[Any]]
    """(I, J, K) with the values of the dataset's files."""
    disagreement: float | None
    """Mean share of dissenting networks over the foreground; None where there is one network."""


def reduce_parts(parts: Sequence[Part], labels: LabelScheme, maps: Maps = NO_MAPS) -> Reduced:
    """Bring the logits of one or several models to the image's own grid.

    Logits are resampled linearly. One model's decide each voxel as they are; the probabilities of
    several are averaged. Voxels outside the crop are background.

    Args:
        parts: At least one; all see the same image and cut it along the same of its axes.
        labels: What the L channels mean, in every part.
        maps: What takes probabilities and the like.

    Raises:
        ValueError: If the parts do not fit together.
    """
    lead, axis = _checked(parts), parts[0].source.axis
    segmentation: NDArray[np.integer[Any]]
    segmentation = np.full(lead.shape_image, labels.background, dtype=labels.value_dtype)
    view = lead.to_network_axes(segmentation)
    tally = _Tally()
    for rows in _output_rows(parts, labels, everywhere=bool(maps.kinds)):
        found = _slab(parts, rows, labels, maps.kinds)
        if found is not None:
            view[within(lead, axis, rows)] = labels.to_values(found.indices)
            tally.add(found)
        put_slab(maps, _made(found, labels, maps.kinds), rows, axis, lead, labels)
    return Reduced(segmentation=segmentation, disagreement=tally.mean)


def segmentation_from_logits(
    logits: torch.Tensor, record: SpatialRecord, labels: LabelScheme
) -> NDArray[np.integer[Any]]:
    """Return the label map on the image's own grid, with the values of the dataset's files.

    Args:
        logits: (L, *record.shape_network), float32.
        record: The way back to the image's grid.
        labels: What the L channels mean.

    Returns:
        (I, J, K) array of the smallest type that holds the dataset's values.
    """
    return reduce_parts([Part(source=Held(logits), record=record)], labels).segmentation


def probabilities_from_logits(
    logits: torch.Tensor, record: SpatialRecord, labels: LabelScheme
) -> NDArray[np.float32]:
    """Return probabilities on the image's own grid.

    Outside the crop the background has probability 1; with regions every region has 0 there.

    Args:
        logits: (L, *record.shape_network), float32.
        record: The way back to the image's grid.
        labels: What the L channels mean.

    Returns:
        (L, I, J, K) float32 array.
    """
    maps = ArrayMaps(frozenset({"probabilities"}), record.shape_image, labels.num_logits)
    reduce_parts([Part(source=Held(logits), record=record)], labels, maps)
    return maps.arrays["probabilities"]


def indices_for_next_stage(
    part: Part, target: SpatialRecord, labels: LabelScheme
) -> NDArray[np.unsignedinteger[Any]]:
    """Return what the first stage of a cascade found, on the grid of the second stage's network.

    Logits are resampled linearly, slab by slab, before each voxel takes its label.

    Args:
        part: What the first stage says.
        target: How the second stage's network sees the same image.
        labels: What the L channels mean.

    Returns:
        (*target.shape_network) label indices.

    Raises:
        ValueError: If the two records are not of one image, cropped alike.

    Source:
        Behaviour of nnU-Net v2, which writes such label maps for the training of a second stage;
        in medseg's own models it is the way in prediction too.
    """
    record = part.record
    for name in ("shape_image", "axes", "flips", "box"):
        if getattr(record, name) != getattr(target, name):
            raise ValueError(
                f"{name} is {getattr(record, name)} in the first stage and "
                f"{getattr(target, name)} in the second; expected one image, cropped alike"
            )
    shape, axis = tuple(target.shape_network), part.source.axis
    found: NDArray[np.unsignedinteger[Any]]
    found = np.empty(shape, dtype=labels.index_dtype)
    for rows in _cut(shape, axis, 0, shape[axis], _thickness([part], shape, axis, labels)):
        slab = _resampled(part, rows, shape, target.spacing_network, labels)
        own = slab.first(labels.num_logits)
        found[(*(slice(None),) * axis, rows)] = segment_slab(own, labels, part.threshold)
    return found


def volumes_ml(
    segmentation: NDArray[np.integer[Any]],
    affine: NDArray[np.float64],
    labels: LabelScheme,
) -> dict[str, float]:
    """Return the volume of every structure in millilitres; a region is the sum of its labels.

    Args:
        segmentation: (I, J, K) label map with the values of files.
        affine: (4, 4) voxel to mm.
        labels: Structures and their label values.
    """
    values, numbers = value_counts(segmentation)
    counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000
    return {
        name: float(f"{sum(counts.get(value, 0) for value in set(values)) * voxel_ml:.12g}")
        for name, values in labels.structures.items()
    }


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Found:
    """A slab of the lead's box, in its network order."""

    indices: NDArray[np.unsignedinteger[Any]]
    probabilities: torch.Tensor | None
    """(L, *slab)."""
    disagreement: torch.Tensor | None
    """(*slab)."""


def _made(
    found: _Found | None, labels: LabelScheme, kinds: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    """Return the maps of a slab."""
    if found is None:
        return {}
    made = {"probabilities": found.probabilities, "disagreement": found.disagreement}
    if "entropy" in kinds and found.probabilities is not None:
        made["entropy"] = entropy(found.probabilities, labels)
    return made


class _Tally:
    """The mean disagreement over the foreground."""

    def __init__(self) -> None:
        self._sum, self._count, self._is_measured = 0.0, 0, False

    def add(self, found: _Found) -> None:
        """Count the foreground of a slab."""
        if found.disagreement is None:
            return
        self._is_measured = True
        inside = found.indices != 0
        self._sum += float(found.disagreement.cpu().numpy()[inside].sum(dtype=np.float64))
        self._count += int(np.count_nonzero(inside))

    @property
    def mean(self) -> float | None:
        """Return it; None where it was not measured."""
        return self._sum / max(1, self._count) if self._is_measured else None


def _checked(parts: Sequence[Part]) -> SpatialRecord:
    """Return the first part's record, having checked that all are of one image, cut alike."""
    lead = parts[0]
    for part in parts:
        if tuple(part.source.shape) != tuple(part.record.shape_network):
            raise ValueError(
                f"logits have the shape {tuple(part.source.shape)}, the record says "
                f"{tuple(part.record.shape_network)}"
            )
        if _place(part) != _place(lead):
            raise ValueError(
                f"parts see an image as {_place(lead)} and {_place(part)}; expected one image, "
                "cropped alike and cut along the same of its axes"
            )
    return lead.record


def _place(part: Part) -> tuple[Any, ...]:
    """Return what all parts share: image, axis that is cut, directions and box of image axes."""
    record, order = part.record, sorted(range(3), key=lambda d: part.record.axes[d])
    return (
        record.shape_image,
        record.axes[part.source.axis],
        tuple(record.flips[d] for d in order),
        tuple(tuple(record.box[d]) for d in order),
    )


def _output_rows(
    parts: Sequence[Part], labels: LabelScheme, *, everywhere: bool
) -> Iterator[slice]:
    """Yield rows of the lead's whole axis, in slabs; those outside the box only where wanted."""
    lead, axis = parts[0].record, parts[0].source.axis
    low, high = lead.box[axis]
    thickness = _thickness(parts, lead.shape_oriented, axis, labels)
    ranges = [(0, low), (low, high), (high, lead.shape_oriented[axis])]
    for start, stop in ranges if everywhere else ranges[1:2]:
        yield from _cut(lead.shape_oriented, axis, start, stop, thickness)


def _cut(shape: Sequence[int], axis: int, start: int, stop: int, thickness: int) -> Iterator[slice]:
    for first in range(start, stop, thickness):
        yield slice(first, min(first + thickness, stop))


def _thickness(parts: Sequence[Part], shape: Sequence[int], axis: int, labels: LabelScheme) -> int:
    """Return how many rows of an output shape are made at once."""
    return slab_rows(shape, axis, labels.num_logits, [part.source.shape for part in parts],
                     [part.source.axis for part in parts])  # fmt: skip


def slab_rows(
    shape: Sequence[int],
    axis: int,
    num_logits: int,
    shapes_network: Sequence[Sequence[int]],
    axes_network: Sequence[int],
) -> int:
    """Return how many rows of an image are exported at once.

    Args:
        shape: Of the image, or of whatever the logits are resampled to.
        axis: The axis that is cut.
        num_logits: L.
        shapes_network: Shape of the logits of each part.
        axes_network: The same axis in each part.
    """
    largest = num_logits * math.prod(shape) / shape[axis]
    for lengths, own in zip(shapes_network, axes_network, strict=True):
        across = math.prod(lengths) / lengths[own]
        largest = max(largest, num_logits * across * lengths[own] / shape[axis])
    return max(1, int(SLAB_ELEMENTS // largest))


def _slab(
    parts: Sequence[Part], rows: slice, labels: LabelScheme, kinds: frozenset[str]
) -> _Found | None:
    """Return a slab of the lead's box; None outside of it."""
    low, high = parts[0].record.box[parts[0].source.axis]
    if rows.stop <= low or rows.start >= high:
        return None
    rows = slice(rows.start - low, rows.stop - low)
    slabs = [
        _resampled(part, rows, part.record.shape_cropped, part.record.spacing_cropped, labels)
        for part in parts
    ]
    if len(parts) == 1:
        return _alone(parts[0], slabs[0], labels, kinds)
    return _together(parts, slabs, labels)


def _alone(part: Part, slab: Slab, labels: LabelScheme, kinds: frozenset[str]) -> _Found:
    """Return what one model says; probabilities are made only where they are asked for."""
    own = slab.first(labels.num_logits)
    disagreement = _dissent(part, slab, labels)
    if not kinds & {"probabilities", "entropy"}:
        return _Found(indices=segment_slab(own, labels, part.threshold), probabilities=None,
                      disagreement=disagreement)  # fmt: skip
    logits = torch.stack(list(own.channels()))
    return _Found(
        indices=indices_of(decide(logits, labels, part.threshold), labels),
        probabilities=part.probabilities(logits, labels),
        disagreement=disagreement,
    )


def _together(parts: Sequence[Part], slabs: Sequence[Slab], labels: LabelScheme) -> _Found:
    """Return what several models say on average, all in the lead's order of axes."""
    total: torch.Tensor | None = None
    opinions = []
    for part, slab in zip(parts, slabs, strict=True):
        order = [part.record.axes.index(axis) for axis in parts[0].record.axes]
        logits = torch.stack(list(slab.first(labels.num_logits).channels()))
        probabilities = part.probabilities(logits, labels).permute(0, *(d + 1 for d in order)).cpu()
        dissent = _dissent(part, slab, labels)
        own = decide(probabilities, labels, 0.5)
        opinions.append((own, None if dissent is None else dissent.permute(order).cpu()))
        weighted = probabilities.mul_(part.weight)
        total = weighted if total is None else total.add_(weighted)
    if total is None:
        raise ValueError("at least one part is needed, got none")
    codes = decide(total, labels, 0.5)
    dissent = torch.zeros(codes.shape)
    for part, (own, inner) in zip(parts, opinions, strict=True):
        inner = torch.zeros(codes.shape) if inner is None else inner
        dissent += part.weight * torch.where(own == codes, inner, 1.0)
    return _Found(indices=indices_of(codes, labels), probabilities=total, disagreement=dissent)


def _dissent(part: Part, slab: Slab, labels: LabelScheme) -> torch.Tensor | None:
    """Return (*slab) the share of a part's networks that decide otherwise than their mean."""
    if part.source.num_channels == labels.num_logits:
        return None
    return next(slab.only(labels.num_logits).channels()).clamp(0, 1)


def _resampled(
    part: Part, rows: slice, shape: Sequence[int], spacing: Sequence[float], labels: LabelScheme
) -> Slab:
    """Return the slab of some rows of the box, on a grid of another shape."""
    source = part.source
    separate = result_axis(part.record, spacing, part.semantics)
    before, after = source.shape[source.axis], shape[source.axis]
    held = rows_needed(before, after, rows, linear=separate != source.axis)
    source.release(held.start)
    return Slab(
        logits=source.rows(held.start, held.stop),
        shape_in=tuple(source.shape),
        shape=tuple(shape),
        axis=source.axis,
        held=held,
        rows=rows,
        separate=separate,
    )
