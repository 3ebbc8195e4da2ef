"""The network of a model of nnU-Net v2, as its plans describe it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from medseg.interop.nnunet.v2_values import (
    Count,
    Features,
    FileSchema,
    Flag,
    Step,
    Text,
    Whole,
    as_many,
    as_whole,
    one_of,
    only,
)
from medseg.schema.base import Schema, is_number

MOST_STAGES = 16
NETWORKS = {"PlainConvUNet": "plain_unet", "ResidualEncoderUNet": "residual_unet"}
"""Class of the network -> kind of architecture."""
_BLOCKS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
NetworkClass = Annotated[
    Text,
    AfterValidator(
        one_of(*NETWORKS, dotted=True, advice="No other network of nnU-Net can be taken over.")
    ),
]
"""Class of a network, of which the last part counts."""
_CONVOLUTIONS = {"Conv2d": 2, "Conv3d": 3}
_NORMS = {"InstanceNorm2d": 2, "InstanceNorm3d": 3, "BatchNorm2d": 2, "BatchNorm3d": 3}
_ACTIVATIONS = {"LeakyReLU": "leaky_relu", "ReLU": "relu", "GELU": "gelu", "Mish": "mish"}


Table = tuple[tuple[int, ...], ...]
"""A number for each stage and axis."""


def all_odd(kernels: Table) -> Table:
    """Return kernel sizes, or raise ValueError if one is even."""
    if any(size % 2 == 0 for entry in kernels for size in entry):
        raise ValueError("expected odd sizes; with even ones a convolution shrinks its image")
    return kernels


def starts_whole(strides: Table) -> Table:
    """Return strides, or raise ValueError unless the first stage keeps the size of the image."""
    if strides and any(step != 1 for step in strides[0]):
        raise ValueError(
            "expected ones for the first stage; with others the result is smaller than the "
            "image, which is not supported"
        )
    return strides


class NetworkArguments(Schema):
    """`arch_kwargs`: what the class of a network is given; anything unknown is refused."""

    n_stages: Annotated[Whole, Field(ge=2, le=MOST_STAGES)]
    """Number of stages."""
    conv_op: Annotated[Text, AfterValidator(one_of(*_CONVOLUTIONS, dotted=True))]
    """Class of the convolutions."""
    features_per_stage: tuple[Features, ...]
    """Feature channels of each encoder stage."""
    kernel_sizes: tuple[tuple[Step, ...], ...]
    """Kernel of each stage and axis."""
    strides: tuple[tuple[Step, ...], ...]
    """Stride of each stage and axis."""
    n_conv_per_stage: tuple[Count, ...] | None = None
    """Convolutions of each encoder stage, of the plain network."""
    n_blocks_per_stage: tuple[Count, ...] | None = None
    """Blocks of each encoder stage, of the residual network."""
    n_conv_per_stage_decoder: tuple[Count, ...]
    """Convolutions of each decoder stage, the coarsest first."""
    conv_bias: Flag = False
    """Whether convolutions have a bias; the layers of the logits always have."""
    norm_op: Annotated[Text, AfterValidator(one_of(*_NORMS, dotted=True))] | None = None
    """Class of the norms; None: there are none."""
    norm_op_kwargs: dict[str, Any] | None = Field(default=None, validate_default=True)
    """What the norms are given."""
    dropout_op: Any = None
    """Has no weights, and does nothing in a prediction."""
    dropout_op_kwargs: Any = None
    """Likewise."""
    nonlin: Annotated[Text, AfterValidator(one_of(*_ACTIVATIONS, dotted=True))]
    """Class of the activations."""
    nonlin_kwargs: dict[str, Any] | None = None
    """What the activations are given."""
    nonlin_first: Flag = False
    """Whether the activation comes before the norm."""
    deep_supervision: Any = None
    """Has no influence on a prediction."""
    block: Annotated[Text, AfterValidator(one_of("BasicBlockD", dotted=True))] | None = None
    """Class of the residual blocks."""
    bottleneck_channels: None = None
    """Only other blocks have them."""
    stem_channels: Whole | None = None
    """Channels of the stem; None: as the first stage."""

    @property
    def num_axes(self) -> int:
        """Return 2 or 3."""
        return _CONVOLUTIONS[self.conv_op]

    @property
    def activation(self) -> str:
        """Return medseg's name of the activation."""
        return _ACTIVATIONS[self.nonlin]

    @property
    def slope(self) -> float:
        """Return the slope of a leaky ReLU."""
        return float((self.nonlin_kwargs or {}).get("negative_slope", 0.01))

    @property
    def norm(self) -> str:
        """Return medseg's name of the norm."""
        if self.norm_op is None:
            return "none"
        return "batch" if self.norm_op.startswith("Batch") else "instance"

    @property
    def epsilon(self) -> float:
        """Return what is added to variances."""
        return float((self.norm_op_kwargs or {}).get("eps", 1e-5))

    @property
    def has_scales(self) -> bool:
        """Return whether norms have weights."""
        default = self.norm == "batch"
        return self.norm_op is not None and bool((self.norm_op_kwargs or {}).get("affine", default))

    @field_validator("features_per_stage", "n_conv_per_stage", "n_blocks_per_stage", mode="before")
    @classmethod
    def _for_every_stage(cls, value: Any, info: ValidationInfo) -> Any:
        is_one = isinstance(as_whole(value), int) and not isinstance(value, bool)
        return (value,) * info.data.get("n_stages", 1) if is_one else value

    @field_validator("n_conv_per_stage_decoder", mode="before")
    @classmethod
    def _for_every_step_up(cls, value: Any, info: ValidationInfo) -> Any:
        is_one = isinstance(as_whole(value), int) and not isinstance(value, bool)
        return (value,) * (info.data.get("n_stages", 2) - 1) if is_one else value

    @field_validator("kernel_sizes", "strides", mode="before")
    @classmethod
    def _for_every_axis(cls, value: Any, info: ValidationInfo) -> Any:
        axes = _CONVOLUTIONS.get(info.data.get("conv_op", ""), 3)
        stages = cls._for_every_stage(value, info)
        if not isinstance(stages, (list, tuple)):
            return stages
        return tuple(
            (entry,) * axes
            if isinstance(as_whole(entry), int) and not isinstance(entry, bool)
            else entry
            for entry in stages
        )

    @field_validator(
        "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"
    )
    @classmethod
    def _fits_the_stages(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            as_many(value, info, "n_stages")
        return value

    @field_validator("n_conv_per_stage_decoder")
    @classmethod
    def _fits_the_steps_up(cls, value: Any, info: ValidationInfo) -> Any:
        as_many(value, info, "n_stages", fewer=1)
        return value

    @field_validator("kernel_sizes", "strides")
    @classmethod
    def _fits_the_axes(cls, value: Any, info: ValidationInfo) -> Any:
        axes = _CONVOLUTIONS.get(info.data.get("conv_op", ""))
        if axes is not None and any(len(entry) != axes for entry in value):
            raise ValueError(f"expected {axes} numbers for each stage, as conv_op says")
        return value

    @field_validator("kernel_sizes")
    @classmethod
    def _has_centres(cls, value: Table) -> Table:
        return all_odd(value)

    @field_validator("strides")
    @classmethod
    def _keeps_the_size(cls, value: Table) -> Table:
        return starts_whole(value)

    @field_validator("norm_op")
    @classmethod
    def _normalises_these_axes(cls, value: str | None, info: ValidationInfo) -> str | None:
        axes = _CONVOLUTIONS.get(info.data.get("conv_op", ""))
        if value is not None and axes is not None and _NORMS[value] != axes:
            raise ValueError(f"expected a norm for {axes} axes, as conv_op says")
        return value

    @field_validator("norm_op_kwargs")
    @classmethod
    def _is_a_usual_norm(cls, value: dict[str, Any] | None, info: ValidationInfo) -> Any:
        is_batch = (info.data.get("norm_op") or "").startswith("Batch")
        allowed: dict[str, Callable[[Any], bool]] = {
            "eps": lambda given: is_number(given) and 0 < given < 1,
            "affine": lambda given: isinstance(given, bool),
            "momentum": lambda given: given is None or is_number(given),
            "track_running_stats": lambda given: given is is_batch,
        }
        return only(value, allowed)

    @field_validator("nonlin_kwargs")
    @classmethod
    def _is_a_usual_activation(cls, value: dict[str, Any] | None, info: ValidationInfo) -> Any:
        allowed: dict[str, Callable[[Any], bool]] = {"inplace": lambda given: True}
        if info.data.get("nonlin") == "LeakyReLU":
            allowed["negative_slope"] = lambda given: is_number(given) and 0 <= given < 1
        if info.data.get("nonlin") == "GELU":
            allowed["approximate"] = lambda given: given == "none"
        return only(value, allowed)

    @field_validator("stem_channels")
    @classmethod
    def _is_as_the_first_stage(cls, value: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("features_per_stage", (value,))[0]
        if value is not None and value != first:
            raise ValueError(f"expected {first}, as features_per_stage starts; others are unknown")
        return value


class NetworkEntry(FileSchema):
    """`architecture`."""

    network_class_name: NetworkClass
    """Class of the network, of which the last part counts."""
    arch_kwargs: NetworkArguments
    """What it is given."""

    @property
    def blocks_encoder(self) -> tuple[int, ...]:
        """Return the number of convolutions or blocks of each encoder stage."""
        return getattr(self.arch_kwargs, _BLOCKS[self.network_class_name]) or ()

    @field_validator("arch_kwargs")
    @classmethod
    def _has_its_blocks(cls, value: NetworkArguments, info: ValidationInfo) -> NetworkArguments:
        name = _BLOCKS.get(info.data.get("network_class_name", ""))
        if name is not None and getattr(value, name) is None:
            raise ValueError(f"{name} is missing; expected a number for each stage")
        return value
