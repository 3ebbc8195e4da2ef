"""Every decision derived from a fingerprint. Per-axis lists are in network order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from medseg.errors import PlanError, near_names
from medseg.schema.base import FORMAT_VERSION, Schema, read, write
from medseg.schema.fingerprint import IntensityStatistics

Normalization = Literal["zscore", "ct", "ct_case", "quantitative", "none", "rescale_0_1", "rgb_0_1"]
KINDS = ("plain_unet", "residual_unet", "mednext_s", "mednext_b", "mednext_m", "mednext_l")
"""Kinds of network that come along."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _as_many(values: Any, info: ValidationInfo, other: str, *, fewer: int = 0) -> None:
    """Raise ValueError unless there are as many entries as in another field (or some fewer)."""
    expected = len(info.data[other]) - fewer if other in info.data else len(values)
    if len(values) != expected:
        entries = "entry" if len(values) == 1 else "entries"
        wanted = f"{expected}, one fewer" if fewer else "as many"
        raise ValueError(
            f"it has {len(values)} {entries}, {other} has {len(info.data[other])}; "
            f"expected {wanted}"
        )


class LeftRight(Schema):
    """Labels that come in a left and a right form, and what mirroring does about it."""

    axis: int = Field(ge=0, le=2)
    """Network axis (of three) that runs between left and right."""
    policy: Literal["swap", "forbid"]
    """`swap`: mirrored along the axis, the two labels of each pair change places; `forbid`: never
    mirrored along the axis."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Label names, left and right."""


def kind_problem(kind: str) -> str | None:
    """Return what is wrong with the kind of a network, in words; None if nothing is.

    Examples:
        >>> kind_problem("mednext_b"), kind_problem("my_networks:Tiny")
        (None, None)
    """
    if kind in KINDS or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", kind):
        return None
    return (
        f'expected one of: {", ".join(KINDS)}, or "package.module:Name".'
        f"{near_names(kind, list(KINDS))}"
    )


class Architecture(Schema):
    """A network, described completely."""

    kind: str
    """`plain_unet`: convolution blocks; `residual_unet`: residual encoder, plain decoder;
    `mednext_s`, `mednext_b`, `mednext_m`, `mednext_l`: MedNeXt blocks; or "package.module:Name"."""
    features: tuple[Count, ...]
    """Feature channels of each stage, full resolution first; its length is the number of stages."""
    kernel_sizes: tuple[tuple[Count, ...], ...]
    """Kernel size of each stage and axis."""
    strides: tuple[tuple[Count, ...], ...]
    """Stride of each stage's first convolution and axis; the first entry is all ones."""
    blocks_encoder: tuple[Count, ...]
    """Convolutions (plain), residual or MedNeXt blocks of each encoder stage."""
    blocks_decoder: tuple[Count, ...]
    """Convolutions (MedNeXt: blocks) of each decoder stage, full resolution first; one entry fewer
    than stages."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What else the network is told, by its own names; not written where there is nothing."""

    @property
    def is_external(self) -> bool:
        """Return whether the network is Python code from outside, "package.module:Name"."""
        return ":" in self.kind

    @field_validator("kind")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if (problem := kind_problem(value)) is not None:
            raise ValueError(problem)
        return value

    @model_serializer(mode="wrap")
    def _without_empty_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "options" or value}

    @property
    def num_axes(self) -> set[int]:
        """Return for how many axes kernels and strides are; one number unless they disagree."""
        return {len(entry) for entry in (*self.kernel_sizes, *self.strides)}

    @field_validator("kernel_sizes", "strides", "blocks_encoder", "blocks_decoder")
    @classmethod
    def _fits_the_stages(cls, values: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        _as_many(values, info, "features", fewer=info.field_name == "blocks_decoder")
        return values


class Configuration(Schema):
    """One network and the preprocessing it needs."""

    patch_size: tuple[Count, ...] = Field(min_length=2, max_length=3)
    """Training patch and inference tile in voxels; its length is the dimension, 2 or 3."""
    batch_size: int = Field(ge=1)
    """Patches per optimiser step."""
    spacing: tuple[Positive, ...]
    """Target voxel size in mm; two entries for a 2D configuration (slices are not resampled)."""
    median_shape: tuple[Positive, ...]
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

    @field_validator("spacing", "median_shape")
    @classmethod
    def _fits_the_patch(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        _as_many(values, info, "patch_size")
        return values

    @field_validator("use_mask_for_norm")
    @classmethod
    def _fits_the_channels(cls, values: tuple[bool, ...], info: ValidationInfo) -> tuple[bool, ...]:
        _as_many(values, info, "normalization")
        return values

    @field_validator("architecture")
    @classmethod
    def _is_for_the_axes(cls, value: Architecture, info: ValidationInfo) -> Architecture:
        axes = len(info.data.get("patch_size", ()))
        if axes and value.num_axes != {axes}:
            found = " and ".join(map(str, sorted(value.num_axes)))
            raise ValueError(
                f"kernel_sizes and strides are for {found} axes, patch_size has {axes} entries; "
                "expected as many everywhere"
            )
        return value


def _is_resolved(values: Any) -> Any:
    if isinstance(values, dict) and "inherits_from" in values:
        raise ValueError(
            f"it inherits from {values['inherits_from']!r}, which is missing, no configuration, or "
            "inherits from it; expected the name of another configuration"
        )
    return values


def _fits_the_intensity(value: Configuration, info: ValidationInfo) -> Configuration:
    schemes, channels = len(value.normalization), len(info.data.get("intensity", ()))
    if "intensity" in info.data and schemes != channels:
        raise ValueError(
            f"normalization has {schemes} entr{'y' if schemes == 1 else 'ies'}, intensity "
            f"{channels}; expected one for each channel"
        )
    return value


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
    taken_from: str | None = None
    """Data set and plans of the model they were taken over from; None: the planner made them."""
    network_axes: tuple[int, int, int]
    """Network axis d is canonical axis `network_axes[d]`."""
    original_median_spacing: tuple[float, float, float]
    """Median voxel size of the raw images in mm, network order."""
    original_median_shape: tuple[float, float, float]
    """Median shape of the cropped raw images in voxels, network order."""
    intensity: tuple[IntensityStatistics, ...]
    """Foreground intensity statistics of each channel (`ct` and `quantitative` use them)."""
    configurations: dict[
        str,
        Annotated[
            Configuration, BeforeValidator(_is_resolved), AfterValidator(_fits_the_intensity)
        ],
    ] = Field(min_length=1)
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

    @field_validator("network_axes")
    @classmethod
    def _is_an_order(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if sorted(value) != [0, 1, 2]:
            raise ValueError("expected 0, 1 and 2 in some order")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give every configuration the keys it takes from another."""
        if not isinstance(values, dict) or not isinstance(values.get("configurations"), dict):
            return values
        entries = values["configurations"]
        resolved = {name: _resolved(entries, name) for name in entries}
        written = {
            name: entry["inherits_from"]
            for name, entry in entries.items()
            if isinstance(entry, dict) and "inherits_from" in entry
            if "inherits_from" not in resolved[name]
        }
        inherits = values.get("inherits", {})
        if isinstance(inherits, dict) and written:
            inherits = {**inherits, **written}
        return {**values, "configurations": resolved, "inherits": inherits}

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
        ConfigError: With every problem: the file is missing, does not fit, or inherits in a circle.
    """
    return read(Plans, path)


def write_plans(path: Path, plans: Plans) -> None:
    """Write a plans file, atomically: what a configuration inherits is not repeated."""
    write(path, plans)


def _resolved(entries: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> Any:
    """Return a configuration with all its keys; `inherits_from` stays if it leads nowhere."""
    entry = entries[name]
    if not isinstance(entry, dict) or "inherits_from" not in entry:
        return entry
    parent = entry["inherits_from"]
    is_there = isinstance(parent, str) and isinstance(entries.get(parent), dict)
    if not is_there or parent in (*seen, name):
        return entry
    own = {key: value for key, value in entry.items() if key != "inherits_from"}
    return {**_resolved(entries, parent, (*seen, name)), **own}
