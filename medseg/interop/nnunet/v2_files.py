"""The plans of a model of nnU-Net v2 as they are written, of every age."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from medseg.interop.nnunet.v2_network import (
    MOST_STAGES,
    NetworkClass,
    NetworkEntry,
    all_odd,
    starts_whole,
)
from medseg.interop.nnunet.v2_values import (
    Count,
    Features,
    FileSchema,
    Flag,
    Length,
    Spacing,
    Step,
    Text,
    Whole,
    as_many,
    one_of,
    only,
)
from medseg.schema.bundle import Orientation, Resampling
from medseg.schema.plans import Normalization

MOST_VOXELS = 2**28
"""Largest patch, far above what any device holds."""

NORMALIZATIONS: dict[str, Normalization] = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale_0_1",
    "RGBTo01Normalization": "rgb_0_1",
}
"""Class that normalises a channel -> medseg's name."""
ORIENTATIONS: dict[str, Orientation] = {
    "SimpleITKIO": "stored_sitk",
    "NibabelIO": "stored_sitk",
    "NaturalImage2DIO": "stored_sitk",
    "Tiff3DIO": "stored_sitk",
    "NibabelIOWithReorient": "canonical",
    "SimpleITKIOWithReorient": "canonical",
}
"""Class that reads images -> frame it brings them to."""
_SEPARATE: dict[Any, str] = {None: "auto", True: "always", False: "never"}
_THRESHOLD = 3


def _resampling(name: str, kwargs: dict[str, Any], *, labels: bool) -> Resampling:
    """Return what a resampling function does.

    Raises:
        ValueError: If it is not known, or told something that is not understood.
    """
    if name == "no_resampling_hack":
        only(kwargs, {})
        return Resampling(method="none")
    allowed: dict[str, Callable[[Any], bool]] = {
        "is_seg": lambda given: given is labels,
        "force_separate_z": lambda given: given is None or isinstance(given, bool),
        "separate_z_anisotropy_threshold": lambda given: given == _THRESHOLD,
    }
    if name == "resample_torch_fornnunet":
        allowed |= {
            "memefficient_seg_resampling": lambda given: given is False or not labels,
            "mode": lambda given: given == "linear",
            "aniso_axis_mode": lambda given: given == "nearest-exact",
            "num_threads": lambda given: True,
            "device": lambda given: True,
        }
        order, force = 1, kwargs.get("force_separate_z")
    else:
        allowed |= {
            "order": lambda given: (
                not isinstance(given, bool) and given in ((0, 1) if labels else (0, 1, 3))
            ),
            "order_z": lambda given: not isinstance(given, bool) and given == 0,
        }
        order, force = kwargs.get("order", 3), kwargs.get("force_separate_z", False)
    only(kwargs, allowed)
    if kwargs.get("is_seg", False) is not labels:
        raise ValueError(f"is_seg is missing; expected {str(labels).lower()}")
    method = "interpolate" if name == "resample_torch_fornnunet" else "spline"
    return Resampling.model_validate(
        {"method": method, "order": int(order), "separate": _SEPARATE[force]}
    )


_Resampler = Annotated[
    Text,
    AfterValidator(
        one_of("resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack")
    ),
]


class ConfigurationEntry(FileSchema):
    """One configuration, what it inherits filled in, without the network."""

    patch_size: tuple[Length, ...]
    """In voxels."""
    spacing: tuple[Spacing, ...]
    """In mm."""
    batch_size: Annotated[Whole, Field(ge=1)] = 1
    """In patches."""
    median_image_size_in_voxels: Any = None
    """Not needed for a prediction."""
    batch_dice: Flag = True
    """Whether the loss pooled the samples of a batch."""
    preprocessor_name: Annotated[Text, AfterValidator(one_of("DefaultPreprocessor"))] = (
        "DefaultPreprocessor"
    )
    """Class that prepares images."""
    normalization_schemes: tuple[Annotated[Text, AfterValidator(one_of(*NORMALIZATIONS))], ...]
    """Of each channel."""
    use_mask_for_norm: tuple[Flag, ...]
    """Of each channel."""
    resampling_fn_data: _Resampler
    """For the image."""
    resampling_fn_data_kwargs: dict[str, Any]
    """What it is told."""
    resampling_fn_seg: _Resampler
    """For label maps."""
    resampling_fn_seg_kwargs: dict[str, Any]
    """What it is told."""
    resampling_fn_probabilities: _Resampler
    """For the logits."""
    resampling_fn_probabilities_kwargs: dict[str, Any]
    """What it is told."""
    previous_stage: Text | None = None
    """Configuration whose segmentation is a further input."""

    @field_validator("patch_size")
    @classmethod
    def _is_of_this_world(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(value) not in (2, 3):
            raise ValueError("expected 2 or 3 numbers")
        if math.prod(value) > MOST_VOXELS:
            raise ValueError(f"{math.prod(value)} voxels; expected at most {MOST_VOXELS}")
        return value

    @field_validator("spacing")
    @classmethod
    def _fits_the_patch(cls, value: Any, info: ValidationInfo) -> Any:
        as_many(value, info, "patch_size")
        return value

    @field_validator("use_mask_for_norm")
    @classmethod
    def _fits_the_channels(cls, value: Any, info: ValidationInfo) -> Any:
        as_many(value, info, "normalization_schemes")
        return value

    @field_validator(
        "resampling_fn_data_kwargs",
        "resampling_fn_seg_kwargs",
        "resampling_fn_probabilities_kwargs",
    )
    @classmethod
    def _is_understood(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        field = str(info.field_name).removesuffix("_kwargs")
        if field in info.data:
            _resampling(info.data[field], value, labels=field.endswith("seg"))
        return value

    @model_validator(mode="after")
    def _labels_follow_the_image(self) -> Self:
        image, labels, _ = self.resampling
        if labels.method == "none" and image.method != "none":
            raise ValueError(
                "resampling_fn_seg leaves label maps as they are, images are resampled"
            )
        return self

    @property
    def resampling(self) -> tuple[Resampling, Resampling, Resampling]:
        """Return what is done to the image, to label maps and to the result."""
        seg, seg_kwargs = self.resampling_fn_seg, self.resampling_fn_seg_kwargs
        result, result_kwargs = (
            self.resampling_fn_probabilities,
            self.resampling_fn_probabilities_kwargs,
        )
        return (
            _resampling(self.resampling_fn_data, self.resampling_fn_data_kwargs, labels=False),
            _resampling(seg, seg_kwargs, labels=True),
            _resampling(result, result_kwargs, labels=False),
        )


class RecentEntry(ConfigurationEntry):
    """A configuration of plans since version 2.3.1."""

    architecture: NetworkEntry
    """The network."""

    @property
    def network(self) -> NetworkEntry:
        """Return the network."""
        return self.architecture


class EarlyEntry(ConfigurationEntry):
    """A configuration of plans before version 2.3.1, whose keys describe the network."""

    UNet_class_name: NetworkClass
    """Class of the network."""
    UNet_base_num_features: Features
    """Feature channels of the first stage."""
    unet_max_num_features: Features
    """Most feature channels."""
    n_conv_per_stage_encoder: tuple[Count, ...]
    """Convolutions or blocks of each encoder stage."""
    n_conv_per_stage_decoder: tuple[Count, ...]
    """Convolutions of each decoder stage."""
    pool_op_kernel_sizes: tuple[tuple[Step, ...], ...]
    """Stride of each stage and axis, the first stage included."""
    conv_kernel_sizes: tuple[tuple[Step, ...], ...]
    """Kernel of each stage and axis."""

    @field_validator("n_conv_per_stage_encoder")
    @classmethod
    def _is_a_pyramid(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not 2 <= len(value) <= MOST_STAGES:
            raise ValueError(f"expected 2 to {MOST_STAGES} stages")
        return value

    @field_validator("n_conv_per_stage_decoder")
    @classmethod
    def _fits_the_steps_up(cls, value: Any, info: ValidationInfo) -> Any:
        as_many(value, info, "n_conv_per_stage_encoder", fewer=1)
        return value

    @field_validator("pool_op_kernel_sizes", "conv_kernel_sizes")
    @classmethod
    def _fits_the_network(cls, value: Any, info: ValidationInfo) -> Any:
        as_many(value, info, "n_conv_per_stage_encoder")
        if any(len(entry) != len(info.data.get("patch_size", entry)) for entry in value):
            raise ValueError("expected a number for each axis of patch_size")
        if str(info.field_name).startswith("pool"):
            return starts_whole(value)
        return all_odd(value)

    @property
    def network(self) -> NetworkEntry:
        """Return the network as recent plans describe it."""
        stages, axes = len(self.n_conv_per_stage_encoder), len(self.patch_size)
        is_plain = self.UNet_class_name == "PlainConvUNet"
        features = [
            min(self.UNet_base_num_features * 2**stage, self.unet_max_num_features)
            for stage in range(stages)
        ]
        arguments = {
            "n_stages": stages,
            "conv_op": f"Conv{axes}d",
            "features_per_stage": features,
            "kernel_sizes": self.conv_kernel_sizes,
            "strides": self.pool_op_kernel_sizes,
            "n_conv_per_stage" if is_plain else "n_blocks_per_stage": self.n_conv_per_stage_encoder,
            "n_conv_per_stage_decoder": self.n_conv_per_stage_decoder,
            "conv_bias": True,
            "norm_op": f"InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": "LeakyReLU",
        }
        return NetworkEntry.model_validate(
            {"network_class_name": self.UNet_class_name, "arch_kwargs": arguments}
        )


class PlansFile(FileSchema):
    """`plans.json`, without its configurations."""

    dataset_name: Text = ""
    """Name of the dataset."""
    plans_name: Text = ""
    """Name of the plans."""
    original_median_spacing_after_transp: Any = None
    """Not needed for a prediction."""
    original_median_shape_after_transp: Any = None
    """Not needed for a prediction."""
    image_reader_writer: Text | None = None
    """Class that reads images."""
    transpose_forward: tuple[Whole, Whole, Whole]
    """Axis d of the network is axis `transpose_forward[d]` of the image, in the order K, J, I."""
    transpose_backward: tuple[Whole, Whole, Whole] | None = None
    """The reverse."""
    label_manager: Annotated[Text, AfterValidator(one_of("LabelManager"))] = "LabelManager"
    """Class that says what logits mean."""

    @field_validator("transpose_forward")
    @classmethod
    def _is_an_order(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if sorted(value) != [0, 1, 2]:
            raise ValueError("expected the axes 0, 1 and 2 in some order")
        return value

    @field_validator("transpose_backward")
    @classmethod
    def _is_the_reverse(cls, value: Any, info: ValidationInfo) -> Any:
        forward = info.data.get("transpose_forward")
        if value is not None and forward is not None:
            if any(not 0 <= axis <= 2 for axis in value):
                raise ValueError("expected the axes 0, 1 and 2 in some order")
            if [forward[axis] for axis in value] != [0, 1, 2]:
                raise ValueError("expected the reverse of transpose_forward")
        return value
