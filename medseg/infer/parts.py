"""What one model says of an image, in the network frame, and how it is brought back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from medseg.geometry import SpatialRecord
from medseg.labels import LabelScheme
from medseg.resample import is_anisotropic, separate_axis
from medseg.schema.bundle import MEDSEG, Semantics


class Source(Protocol):
    """Logits of one image, handed out as rows along one axis, front to back."""

    axis: int
    shape: tuple[int, ...]
    """(n0, n1, n2)."""
    num_channels: int
    """L, or one more where the disagreement of the networks follows the logits."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return (L, n0, n1, n2) but for `stop - start` rows along the axis, float32."""

    def release(self, stop: int) -> None:
        """Forget rows before one."""


class Held:
    """Logits that are in memory."""

    def __init__(self, logits: torch.Tensor, axis: int = 0) -> None:
        """Take over logits (L, n0, n1, n2)."""
        self.axis, self._logits = axis, logits
        self.shape, self.num_channels = tuple(logits.shape[1:]), len(logits)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return some rows, which share memory with the logits."""
        return self._logits.narrow(self.axis + 1, start, stop - start)

    def release(self, stop: int) -> None:
        """Keep everything."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Part:
    """What one model says of an image."""

    source: Source
    record: SpatialRecord
    """The way back to the image's grid."""
    weight: float = 1.0
    """Share in the mean, with those of all parts 1."""
    semantics: Semantics = MEDSEG
    """What the source holds, and how it is resampled."""

    @property
    def holds_probabilities(self) -> bool:
        """Return whether the source holds probabilities, not logits."""
        return self.semantics.average == "probabilities"

    @property
    def threshold(self) -> float:
        """Return the value above which a region is there."""
        return 0.5 if self.holds_probabilities else 0.0

    def probabilities(self, values: torch.Tensor, labels: LabelScheme) -> torch.Tensor:
        """Return (L, *spatial) probabilities of what the source holds."""
        return values.float() if self.holds_probabilities else labels.activate(values)


def result_axis(
    record: SpatialRecord, spacing: Sequence[float], semantics: Semantics
) -> int | None:
    """Return the network axis along which the nearest slices are taken on the way back, or None.

    By default it is decided from the network's spacing and the one asked for: a 2D configuration
    keeps the length of its slice axis, so slices never mix.

    Args:
        record: How the network saw the image.
        spacing: Voxel size asked for in mm, network order.
        semantics: How the axis is decided.

    Source:
        nnU-Net v2 (`separate_by` network) and v1 (image).
    """
    when = semantics.resample_result.separate
    if semantics.separate_by == "network":
        return separate_axis(record.spacing_network, spacing, when=when)
    if when != "auto" or is_anisotropic(spacing):
        return separate_axis(spacing, spacing, when=when)
    number = separate_axis(record.spacing_network, record.spacing_network)
    return None if number is None else record.axes.index(2 - number)
