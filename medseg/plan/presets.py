"""The planners one can ask for by name: which network, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg.errors import ConfigError, near_names

BASE_FEATURES = 32
"""Feature channels at full resolution; they double with each stage."""
MAX_FEATURES = {2: 512, 3: 320}
"""Largest number of feature channels, by dimension."""
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
}
"""Preset name -> preset. Source: constants of nnU-Net 2.8.1's planners."""


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
