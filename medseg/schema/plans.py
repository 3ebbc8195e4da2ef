"""Every decision derived from a fingerprint. Per-axis lists are in network order."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.errors import ConfigError, PlanError, near_names
from medseg.schema.base import FORMAT_VERSION, Schema, read, write
from medseg.schema.fingerprint import IntensityStatistics

Normalization = Literal["zscore", "ct", "quantitative", "none", "rescale_0_1", "rgb_0_1"]


class LeftRight(Schema):
    """Labels that come in a left and a right form, and what mirroring does about it."""

    axis: int = Field(ge=0, le=2)
    """Network axis (of three) that runs between left and right."""
    policy: Literal["swap", "forbid"]
    """`swap`: mirrored along the axis, the two labels of each pair change places; `forbid`: never
    mirrored along the axis."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Label names, left and right."""


class Architecture(Schema):
    """A network, described completely."""

    kind: Literal["plain_unet", "residual_unet"]
    """`plain_unet`: convolution blocks; `residual_unet`: residual encoder, plain decoder."""
    features: tuple[int, ...]
    """Feature channels of each stage, full resolution first; its length is the number of stages."""
    kernel_sizes: tuple[tuple[int, ...], ...]
    """Kernel size of each stage and axis."""
    strides: tuple[tuple[int, ...], ...]
    """Stride of each stage's first convolution and axis; the first entry is all ones."""
    blocks_encoder: tuple[int, ...]
    """Convolutions (plain) or residual blocks (residual) of each encoder stage."""
    blocks_decoder: tuple[int, ...]
    """Convolutions of each decoder stage, full resolution first; one entry fewer than stages."""


class Configuration(Schema):
    """One network and the preprocessing it needs."""

    patch_size: tuple[int, ...]
    """Training patch and inference tile in voxels; its length is the dimension, 2 or 3."""
    batch_size: int = Field(ge=1)
    """Patches per optimiser step."""
    spacing: tuple[float, ...]
    """Target voxel size in mm; two entries for a 2D configuration (slices are not resampled)."""
    median_shape: tuple[float, ...]
    """Median image shape at the target spacing, in voxels."""
    normalization: tuple[Normalization, ...]
    """Intensity normalisation of each channel."""
    use_mask_for_norm: tuple[bool, ...]
    """Whether statistics of each channel come from, and zeros stay outside, the non-zero mask."""
    batch_dice: bool
    """Whether the Dice loss pools all samples of a batch."""
    architecture: Architecture
    """The network."""
    previous_stage: str | None = None
    """Configuration whose segmentation is a further input (cascade)."""

    @property
    def num_dimensions(self) -> int:
        """Return 2 or 3."""
        return len(self.patch_size)


class Plans(Schema):
    """Every decision derived from a fingerprint; `plans/PLANS.json`.

    In the file a configuration may say `inherits_from`: it takes the keys it lacks from that
    configuration, and is written the same way again.
    """

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    name: str
    """Name of the preset, or one's own."""
    dataset: str
    """Name of the dataset the plans were made for."""
    asked_gpu_memory_gb: float | None = None
    """GPU memory that was asked for, in GB; None: the preset's."""
    asked_target_spacing: tuple[float, float, float] | None = None
    """Voxel size that was asked for, in mm, canonical axes (I, J, K); None: the planner's."""
    network_axes: tuple[int, int, int]
    """Network axis d is canonical axis `network_axes[d]`."""
    original_median_spacing: tuple[float, float, float]
    """Median voxel size of the raw images in mm, network order."""
    original_median_shape: tuple[float, float, float]
    """Median shape of the cropped raw images in voxels, network order."""
    intensity: tuple[IntensityStatistics, ...]
    """Foreground intensity statistics of each channel (`ct` and `quantitative` use them)."""
    configurations: dict[str, Configuration]
    """Configuration name -> configuration."""
    inherits: dict[str, str] = Field(default_factory=dict)
    """Configuration -> the one it is written after; in the file, its `inherits_from`."""
    left_right: LeftRight | None = None
    """Present where labels have sides."""
    why: tuple[str, ...] = ()
    """The reasons of the decisions, in words."""

    def configuration(self, name: str) -> Configuration:
        """Return one configuration.

        Raises:
            PlanError: If the plans do not hold it.
        """
        if name not in self.configurations:
            known = sorted(self.configurations)
            raise PlanError(
                f"plans {self.name!r} of {self.dataset!r} have no configuration {name!r}; "
                f"expected one of: {', '.join(known)}.{near_names(name, known)}"
            )
        return self.configurations[name]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give every configuration the keys it takes from another."""
        if not isinstance(values, dict) or not isinstance(values.get("configurations"), dict):
            return values
        entries = values["configurations"]
        written = {
            name: entry["inherits_from"]
            for name, entry in entries.items()
            if isinstance(entry, dict) and "inherits_from" in entry
        }
        if not written:
            return values
        return {
            **values,
            "configurations": {name: _resolved(entries, name) for name in entries},
            "inherits": {**values.get("inherits", {}), **written},
        }

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a configuration has from the one it inherits from."""
        values: dict[str, Any] = handler(self)
        full: dict[str, Any] = values["configurations"]
        short = {
            name: {
                "inherits_from": parent,
                **{key: value for key, value in full[name].items() if value != full[parent][key]},
            }
            for name, parent in values.pop("inherits").items()
            if name in full and parent in full
        }
        for entry in full.values():
            if entry["previous_stage"] is None:
                del entry["previous_stage"]
        return {**values, "configurations": {**full, **short}}


def read_plans(path: Path) -> Plans:
    """Read a plans file.

    Raises:
        ConfigError: If the file is missing, does not fit, or inherits in a circle.
    """
    return read(Plans, path)


def write_plans(path: Path, plans: Plans) -> None:
    """Write a plans file, atomically: what a configuration inherits is not repeated."""
    write(path, plans)


def _resolved(entries: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> Any:
    entry = entries.get(name)
    if not isinstance(entry, dict) or "inherits_from" not in entry:
        return entry
    parent = entry["inherits_from"]
    if parent in (*seen, name) or parent not in entries:
        raise ConfigError(
            f"configuration {name!r} inherits from {parent!r}, which is missing or "
            f"inherits from it; expected one of: {', '.join(sorted(set(entries) - {name}))}."
        )
    own = {key: value for key, value in entry.items() if key != "inherits_from"}
    return {**_resolved(entries, parent, (*seen, name)), **own}
