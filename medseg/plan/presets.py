"""The planners one can ask for by name: which network, and what it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from medseg.errors import ConfigError, near_names

MIN_EDGE = 4
"""Shortest edge of the deepest feature map, in voxels."""
MIN_BATCH = 2
"""Smallest batch size."""
REFERENCE_BATCH = {2: 12, 3: 2}
"""Batch size at which a network of the reference size fills the memory, by dimension."""
INITIAL_EDGE = {2: 2048, 3: 256}
"""Edge, in voxels, of the square or cube whose content the first patch has, by dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named planner."""

    name: str
    """Name, as in `--plans`."""
    kind: Literal["plain_unet", "residual_unet"]
    """Kind of network."""
    blocks_encoder: tuple[int, ...]
    """Blocks of the first encoder stages; deeper stages repeat the last entry."""
    blocks_decoder: int
    """Convolutions of every decoder stage."""
    reference_voxels: dict[int, int]
    """Feature map values of one sample of the reference network, by dimension."""
    memory_gb: float
    """GPU memory the reference network needs, and the default target."""
    max_dataset_share: float
    """Largest part of the data set's voxels in one batch."""
    large_2d_patch: bool
    """Whether a 2D patch may grow until `MIN_BATCH` of them, not the reference batch, fit."""
    base_features: int = 32
    """Feature channels at full resolution; they double with each stage."""
    max_features: dict[int, int] = field(default_factory=lambda: {2: 512, 3: 320})
    """Largest number of feature channels, by dimension."""
    max_operations: float = math.inf
    """Additions and multiplications one training step may take; for machines without GPU."""

    def features(self, num_stages: int, dimension: int) -> tuple[int, ...]:
        """Return the feature channels of each stage.

        Examples:
            >>> PRESETS["nnunet"].features(6, 3)
            (32, 64, 128, 256, 320, 320)
        """
        largest = self.max_features[dimension]
        return tuple(min(self.base_features * 2**stage, largest) for stage in range(num_stages))

    def blocks(self, num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the blocks of each encoder stage and of each decoder stage."""
        deeper = (self.blocks_encoder[-1],) * num_stages
        return (self.blocks_encoder + deeper)[:num_stages], (self.blocks_decoder,) * (
            num_stages - 1
        )


def _residual(name: str, *, voxels_2d: int, voxels_3d: int, memory_gb: float) -> Preset:
    return Preset(
        name=name,
        kind="residual_unet",
        blocks_encoder=(1, 3, 4, 6),
        blocks_decoder=1,
        reference_voxels={2: voxels_2d, 3: voxels_3d},
        memory_gb=memory_gb,
        max_dataset_share=1.0,
        large_2d_patch=False,
    )


PRESETS = {
    "nnunet": Preset(
        name="nnunet",
        kind="plain_unet",
        blocks_encoder=(2,),
        blocks_decoder=2,
        reference_voxels={2: 85_000_000, 3: 560_000_000},
        memory_gb=8,
        max_dataset_share=0.05,
        large_2d_patch=True,
    ),
    "resenc_m": _residual("resenc_m", voxels_2d=135_000_000, voxels_3d=680_000_000, memory_gb=8),
    "resenc_l": _residual("resenc_l", voxels_2d=380_000_000, voxels_3d=2_100_000_000, memory_gb=24),
    "resenc_xl": _residual(
        "resenc_xl", voxels_2d=560_000_000, voxels_3d=3_600_000_000, memory_gb=40
    ),
    "cpu": Preset(
        name="cpu",
        kind="plain_unet",
        blocks_encoder=(2,),
        blocks_decoder=2,
        reference_voxels={2: 20_000_000, 3: 125_000_000},
        memory_gb=4,
        max_dataset_share=0.05,
        large_2d_patch=False,
        base_features=16,
        max_features={2: 256, 3: 256},
        max_operations=1e11,
    ),
}
"""Preset name -> preset.

Source:
    Constants of nnU-Net 2.8.1's planners, but for `cpu`: two processor cores do 60 to 80 billion
    operations a second (scripts/bench/step.py), so that a step takes 1.2 to 1.7 s; its
    reference batch holds 2 GB of feature maps, 8 bytes for each value (before and after
    normalisation, in single precision).
"""


def get_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PRESETS:
        known = sorted(PRESETS)
        raise ConfigError(
            f"no planner preset {name!r}; expected one of: {', '.join(known)}."
            f"{near_names(name, known)}"
        )
    return PRESETS[name]
