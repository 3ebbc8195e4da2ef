"""Every named loss as a slow walk over samples, structures and voxels, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

SMOOTH = 1e-5


def slow_loss(name: str, given: tuple[Any, ...], batch_dice: bool, **options: Any) -> float:
    """Return the loss of (logits, target, valid, annotated); regions have a bool target."""
    batch = Batch(*given)
    first, _, second = name.partition("_")
    total = 0.0
    for kind in [each for each in (first, second) if each]:
        weight = options.get(f"weight_{kind}", 1.0)
        if kind in ("dice", "tversky"):
            total += weight * batch.overlap(kind, batch_dice, options)
        else:
            total += weight * batch.over_voxels(kind, options)
    return total


class Batch:
    """Logits, target and masks as nested lists over samples, channels and voxels."""

    def __init__(
        self, logits: Tensor, target: Tensor, valid: Tensor | None, annotated: Tensor | None
    ) -> None:
        self.has_regions = target.ndim == logits.ndim
        self.logits = logits.detach().double().flatten(2).tolist()
        self.target = target.flatten(2 if self.has_regions else 1).tolist()
        self.num_samples, self.num_channels = logits.shape[:2]
        self.num_voxels = len(self.logits[0][0])
        everywhere = [[True] * self.num_voxels] * self.num_samples
        self.valid = everywhere if valid is None else valid.flatten(1).tolist()
        all_drawn = [[True] * self.num_channels] * self.num_samples
        self.annotated = all_drawn if annotated is None else annotated.tolist()

    def places(self) -> Iterator[tuple[int, int]]:
        for sample in range(self.num_samples):
            for voxel in range(self.num_voxels):
                if self.valid[sample][voxel]:
                    yield sample, voxel

    def column(self, sample: int, voxel: int) -> list[float]:
        return [self.logits[sample][channel][voxel] for channel in range(self.num_channels)]

    def chances(self, sample: int, voxel: int) -> list[float]:
        column = self.column(sample, voxel)
        if self.has_regions:
            return [sigmoid(value) for value in column]
        raised = [math.exp(value - max(column)) for value in column]
        return [value / sum(raised) for value in raised]

    def is_in(self, sample: int, voxel: int, channel: int) -> bool:
        if self.has_regions:
            return self.target[sample][channel][voxel]
        return self.target[sample][voxel] == channel

    def overlap(self, kind: str, batch_dice: bool, options: dict[str, Any]) -> float:
        everyone = list(range(self.num_samples))
        scores = []
        for group in [everyone] if batch_dice else [[sample] for sample in everyone]:
            for channel in range(0 if self.has_regions else 1, self.num_channels):
                members = [sample for sample in group if self.annotated[sample][channel]]
                if members:
                    scores.append(self.index(kind, members, channel, options))
        return -sum(scores) / max(len(scores), 1)

    def index(self, kind: str, members: list[int], channel: int, options: dict[str, Any]) -> float:
        right = predicted = squares = present = 0.0
        for sample, voxel in self.places():
            if sample in members:
                chance = self.chances(sample, voxel)[channel]
                is_in = self.is_in(sample, voxel, channel)
                right += chance * is_in
                predicted += chance
                squares += chance**2
                present += is_in
        smooth = options.get("smooth", SMOOTH)
        if kind == "dice":
            size = squares if options.get("squared") else predicted
            return (2 * right + smooth) / (size + present + smooth)
        alpha, beta = options.get("alpha", 0.3), options.get("beta", 0.7)
        wrong = alpha * (predicted - right) + beta * (present - right)
        return (right + smooth / 2) / (right + wrong + smooth / 2)

    def over_voxels(self, kind: str, options: dict[str, Any]) -> float:
        is_binary = self.has_regions or kind == "bce"
        truths = list(self.binary_truths() if is_binary else self.label_truths())
        if kind == "focal":
            gamma = options.get("gamma", 2.0)
            values = [-math.log(truth) * (1 - truth) ** gamma for truth in truths]
        else:
            values = [-math.log(truth) for truth in truths]
        if kind == "topk" and values:
            number = max(1, int(len(values) * options.get("k", 10) / 100))
            values = sorted(values)[-number:]
        return sum(values) / max(len(values), 1)

    def label_truths(self) -> Iterator[float]:
        """Give the chance of what each voxel may be."""
        for sample, voxel in self.places():
            chances, label = self.chances(sample, voxel), self.target[sample][voxel]
            truth = chances[label]
            if label == 0:
                truth += sum(
                    chances[other]
                    for other in range(1, self.num_channels)
                    if not self.annotated[sample][other]
                )
            yield truth

    def binary_truths(self) -> Iterator[float]:
        """Give the chance of the right answer for each voxel and channel with a known one."""
        for sample, voxel in self.places():
            column, drawn = self.column(sample, voxel), self.annotated[sample]
            for channel in range(self.num_channels):
                is_known = drawn[channel]
                if not self.has_regions and self.target[sample][voxel] != 0:
                    is_known = True
                elif not self.has_regions and channel == 0:
                    is_known = all(drawn)
                if is_known:
                    sign = 1 if self.is_in(sample, voxel, channel) else -1
                    yield sigmoid(sign * column[channel])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))
