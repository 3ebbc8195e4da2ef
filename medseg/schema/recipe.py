"""A training recipe: everything about training that is not in the plans."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from medseg.schema.base import FORMAT_VERSION, Schema


class OptimizerRecipe(Schema):
    """Which optimiser, and its constants."""

    name: str = "sgd"
    """`sgd`, `adam` or `adamw`."""
    lr: PositiveFloat = 0.01
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 3e-5
    """Weight decay."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """Momentum (Nesterov) of SGD; first beta of Adam and AdamW is 0.9."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Second beta of Adam and AdamW."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from one stage to the next, counted from the logits down the
    decoder and up the encoder to the stem, which learns slowest; 1: all alike."""
    freeze_encoder: float = Field(default=0.0, ge=0, le=1)
    """Share of the run, from its start, in which the encoder does not learn."""


class ScheduleRecipe(Schema):
    """How the learning rate moves over the whole run."""

    name: Literal["poly", "cosine", "constant"] = "poly"
    """Shape of the decay after the warm-up."""
    power: PositiveFloat = 0.9
    """Exponent of the polynomial decay."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run during which the rate rises linearly from 0."""
    per: Literal["epoch", "iteration"] = "epoch"
    """Whether the rate changes once an epoch (as nnU-Net does) or every iteration."""


class LossRecipe(Schema):
    """Which loss."""

    name: str = "dice_ce"
    """A name of `medseg.losses` (`dice_ce`, `dice`, `ce`, `dice_topk`, `dice_focal`, `tversky` ...)
    or "package.module:Name"; with regions, BCE stands in for CE."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Constants of the loss, by its own names, such as {gamma: 2} for `dice_focal`."""
    batch_dice: bool | None = None
    """Pool the Dice over the batch; None takes the plans' decision."""
    deep_supervision: bool = True
    """Also supervise the lower-resolution outputs, weights halving with each."""


class SamplingRecipe(Schema):
    """Which patches are cut."""

    foreground_fraction: float = Field(default=0.33, ge=0, le=1)
    """Share of a batch's patches (its last samples) that must contain foreground."""
    foreground_from: Literal["case", "class"] = "case"
    """What such a patch chooses first: `case`: a case, then one of its structures (as nnU-Net);
    `class`: a structure, then a case that has it, so that rare ones are seen as often as others."""
    foreground_unit: Literal["voxel", "lesion"] = "voxel"
    """What it is centred on: `voxel`: any voxel of the structure alike; `lesion`: any connected
    part of it alike, so that small lesions are seen as often as large ones."""
    batch_size: PositiveInt | None = None
    """Patches per step, over all devices; None takes the plans' decision."""
    patch_fraction: float = Field(default=1.0, gt=0, le=1)
    """Edge of training patch and inference tile as a share of the planned one, rounded to what the
    network's strides allow. (Both alike: instance norm sees other statistics in another size.)"""


class AugmentationRecipe(Schema):
    """The augmentation of a patch; the defaults are nnU-Net's."""

    backend: Literal["torch", "batchgenerators", "none"] = "torch"
    """`torch`: batched on the training device; `batchgenerators`: that library, on the CPU."""
    rotation_probability: float = Field(default=0.2, ge=0, le=1)
    """Chance of a random rotation."""
    rotation_max_deg: float | None = None
    """Largest angle about each axis; None: 30 in 3D, 180 in 2D (15 for elongated patches)."""
    scaling_probability: float = Field(default=0.2, ge=0, le=1)
    """Chance of a random isotropic zoom."""
    scaling_range: tuple[float, float] = (0.7, 1.4)
    """Zoom factors."""
    elastic_probability: float = Field(default=0.0, ge=0, le=1)
    """Chance of an elastic deformation."""
    noise_probability: float = Field(default=0.1, ge=0, le=1)
    """Chance of additive Gaussian noise (standard deviation 0 to 0.1)."""
    blur_probability: float = Field(default=0.2, ge=0, le=1)
    """Chance of a Gaussian blur (sigma 0.5 to 1; each channel with chance 0.5)."""
    brightness_probability: float = Field(default=0.15, ge=0, le=1)
    """Chance of a multiplication by 0.75 to 1.25 (each channel)."""
    contrast_probability: float = Field(default=0.15, ge=0, le=1)
    """Chance of a contrast change by 0.75 to 1.25 about the mean, range kept."""
    low_resolution_probability: float = Field(default=0.25, ge=0, le=1)
    """Chance of a simulated low resolution (0.5 to 1; each channel with chance 0.5)."""
    gamma_probability: float = Field(default=0.3, ge=0, le=1)
    """Chance of a gamma change (0.7 to 1.5), statistics kept."""
    inverted_gamma_probability: float = Field(default=0.1, ge=0, le=1)
    """Chance of a gamma change of the negated image."""
    previous_operator_probability: float = Field(default=0.4, ge=0, le=1)
    """Cascade: chance of a random dilation, erosion, opening or closing of a structure that the
    stage before found."""
    previous_removal_probability: float = Field(default=0.2, ge=0, le=1)
    """Cascade: chance that connected parts of such a structure are taken away."""
    mirror_axes: tuple[NonNegativeInt, ...] | None = None
    """Axes of the patch that may be mirrored, also in test-time augmentation; None: all. The plans
    forbid one where labels have sides that cannot change places."""


class NetworkRecipe(Schema):
    """Changes to the planned network."""

    kind: str | None = None
    """Another kind of network on the planned topology: `plain_unet`, `residual_unet`, `mednext_s`,
    `mednext_b`, `mednext_m`, `mednext_l`, or "package.module:Name"; None keeps the planned one."""
    kernel_size: Literal[3, 5] | None = None
    """Kernel of MedNeXt's depthwise convolutions; None: 3."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a network given as "package.module:Name"."""
    base_features: PositiveInt | None = None
    """Feature channels at full resolution; None keeps the plans'."""
    max_features: PositiveInt | None = None
    """Largest number of feature channels; None keeps the plans'."""


class Recipe(Schema):
    """Everything about training that is not in the plans; a YAML file in `configs/`."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    description: str = ""
    """What the recipe is for, in one line."""
    epochs: PositiveInt = 1000
    """Training length; one epoch is `iterations_per_epoch` optimiser steps."""
    iterations_per_epoch: PositiveInt = 250
    """Optimiser steps per epoch, independent of the dataset's size."""
    validation_iterations: NonNegativeInt = 50
    """Batches of validation patches per epoch, for the journal alone."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    """Optimiser."""
    schedule: ScheduleRecipe = ScheduleRecipe()
    """Learning-rate schedule."""
    loss: LossRecipe = LossRecipe()
    """Loss."""
    sampling: SamplingRecipe = SamplingRecipe()
    """Patch sampling."""
    augmentation: AugmentationRecipe = AugmentationRecipe()
    """Augmentation."""
    network: NetworkRecipe = NetworkRecipe()
    """Changes to the planned network."""
    gradient_clip: PositiveFloat | None = 12.0
    """Largest L2 norm of the gradient; None does not clip."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which then is what is saved."""
    checkpoint_minutes: PositiveFloat = 5.0
    """Time between two checkpoints."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network; auto: bf16 or fp16 where the hardware has them."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """`torch.compile`: `auto` keeps it where it is timed faster; `graphs`: with CUDA graphs."""

    @field_validator("compile", mode="before")
    @classmethod
    def _word_of_switch(cls, value: Any) -> Any:
        """Take YAML's on and off, which it reads as true and false, for the words."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
