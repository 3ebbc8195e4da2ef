"""What nnU-Net v2's `plans.json` and `dataset.json` say of a model, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medseg.interop.nnunet.foreign import ForeignModel
from medseg.labels import LabelScheme
from medseg.models.blocks import NEGATIVE_SLOPE
from medseg.models.build import architecture_problems
from medseg.models.options import UNetOptions, unet_options
from medseg.schema.bundle import Resampling, Semantics
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Normalization

FILE_ENDING = ".nii.gz"
READERS = {"canonical": "NibabelIOWithReorient", "stored_sitk": "SimpleITKIO"}
"""Orientation -> what brings images to it."""
_NETWORKS = {
    "plain_unet": ("PlainConvUNet", "n_conv_per_stage"),
    "residual_unet": ("ResidualEncoderUNet", "n_blocks_per_stage"),
}
"""Kind -> its class, and what that calls the blocks of the encoder."""
_SCHEMES: dict[Normalization, str] = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "quantitative": "CTNormalization",
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}
_NORMS = {"instance": "instancenorm.InstanceNorm", "batch": "batchnorm.BatchNorm"}
_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "leaky_relu": ("LeakyReLU", {"inplace": True}),
    "relu": ("ReLU", {"inplace": True}),
    "mish": ("Mish", {"inplace": True}),
    "gelu": ("GELU", {}),
}
_SEPARATE = {"auto": None, "always": True, "never": False}
_LEAST_STD = 1e-8
"""Below it CTNormalization divides by this."""
_NARROW_LABELS, _NARROW, _WIDE = 255, 255, 2**15 - 1
"""With fewer labels than the first, values of files reach to the second, else to the third."""
_SEMANTICS: dict[str, tuple[Any, str]] = {
    "average": ("logits", "it averages logits"),
    "normalise_first": (True, "it normalises before it resamples"),
    "least_std": ("floor", "it divides by at least 1e-8"),
    "keeps_slices": (False, "in 3D it resamples every axis"),
    "separate_by": ("network", "on the way back it looks at the network's grid first"),
}
"""Field -> the only value there is a counterpart of, and why."""


def plans_of(stages: Sequence[ForeignModel], model: ForeignModel) -> dict[str, Any]:
    """Return `plans.json` of one of the stages, with the configurations of all of them.

    Args:
        stages: All models, each stage after the one whose result it takes.
        model: The one among them whose file it is.
    """
    plans = model.plans
    forward = [2 - axis for axis in plans.network_axes]
    followers = {
        stage.plans.configuration(stage.configuration).previous_stage: stage.configuration
        for stage in stages
    }
    return {
        "dataset_name": plans.dataset,
        "plans_name": plans.name,
        "original_median_spacing_after_transp": list(plans.original_median_spacing),
        "original_median_shape_after_transp": list(plans.original_median_shape),
        "image_reader_writer": READERS[model.orientation],
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": {
            stage.configuration: _configuration(stage, followers.get(stage.configuration))
            for stage in stages
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(number): _intensity(scheme, plans.intensity[number])
            for number, scheme in enumerate(plans.configuration(model.configuration).normalization)
        },
    }


def dataset_of(model: ForeignModel, num_training: int) -> dict[str, Any]:
    """Return `dataset.json`.

    Args:
        model: Gives channels and labels.
        num_training: Number of training cases.
    """
    scheme = LabelScheme.from_spec(model.spec)
    labels = {name: _label(entry) for name, entry in scheme.labels.items()}
    if scheme.ignore_label is not None and _keeps_ignore(scheme):
        labels["ignore"] = scheme.ignore_label
    values: dict[str, Any] = {
        "channel_names": {str(number): name for number, name in enumerate(model.spec.channels)},
        "labels": labels,
        "numTraining": num_training,
        "file_ending": FILE_ENDING,
    }
    if scheme.has_regions:
        values["regions_class_order"] = list(scheme.regions_class_order or ())
    if model.orientation == "canonical":
        values["overwrite_image_reader_writer"] = READERS[model.orientation]
    return values


def problems_of(model: ForeignModel) -> list[str]:
    """Return everything of a model that nnU-Net v2 has no counterpart of, each a sentence or two.

    What is only slightly different, or a matter of later steps, is no problem: see `notes_of`.
    """
    configuration = model.plans.configuration(model.configuration)
    return [
        *_semantics_problems(model.semantics),
        *_architecture_problems(configuration.architecture),
        *_normalization_problems(model, configuration),
        *_label_problems(LabelScheme.from_spec(model.spec)),
    ]


def notes_of(model: ForeignModel) -> list[str]:
    """Return what differs in nnU-Net without being refused, each a sentence."""
    scheme, semantics = LabelScheme.from_spec(model.spec), model.semantics
    configuration = model.plans.configuration(model.configuration)
    notes = []
    if semantics.swap_axes:
        axes = ", ".join(map(str, semantics.swap_axes))
        notes.append(
            f"{model.configuration}: axis {axes} is not mirrored there: labels change places with "
            "left and right, which nnU-Net cannot do."
        )
    if scheme.ignore_label is not None and not _keeps_ignore(scheme):
        notes.append(
            f"the ignore label ({scheme.ignore_label}) is left out: nnU-Net wants it to follow the "
            "highest label. It is never predicted."
        )
    if configuration.previous_stage is not None and semantics.previous == "logits":
        notes.append(
            f"{model.configuration}: nnU-Net hands the label map of {configuration.previous_stage} "
            "over, medseg its logits; voxels at the borders may differ."
        )
    if semantics.label_resize == "threshold":
        notes.append(
            f"{model.configuration}: label maps are resampled there as the installed "
            "batchgenerators does, not by the rule of its releases before 0.25.4."
        )
    return notes


def mirror_axes_of(semantics: Semantics) -> tuple[int, ...] | None:
    """Return the axes that nnU-Net may mirror; None if there are none.

    Examples:
        >>> mirror_axes_of(Semantics(mirror_axes=(0, 1, 2), swap_axes=(2,)))
        (0, 1)
    """
    return tuple(a for a in semantics.mirror_axes if a not in semantics.swap_axes) or None


def place_of_norm(architecture: Architecture) -> int:
    """Return which of a block's modules is the norm; the convolution is the first, number 0."""
    return 2 if unet_options(architecture).style.activation_first else 1


def _configuration(model: ForeignModel, next_stage: str | None) -> dict[str, Any]:
    configuration, semantics = model.plans.configuration(model.configuration), model.semantics
    values = {
        "data_identifier": f"{model.plans.name}_{model.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.batch_size,
        "patch_size": list(configuration.patch_size),
        "median_image_size_in_voxels": list(configuration.median_shape),
        "spacing": list(configuration.spacing),
        "normalization_schemes": [_SCHEMES[scheme] for scheme in configuration.normalization],
        "use_mask_for_norm": list(configuration.use_mask_for_norm),
        **_resampling("data", semantics.resample_image),
        **_resampling("seg", semantics.resample_labels, semantics.label_resize),
        **_resampling("probabilities", semantics.resample_result),
        "batch_dice": configuration.batch_dice,
        "architecture": _architecture(configuration.architecture),
    }
    if configuration.previous_stage is not None:
        values["previous_stage"] = configuration.previous_stage
    if next_stage is not None:
        values["next_stage"] = next_stage
    return values


def _resampling(what: str, rule: Resampling, label_resize: str = "argmax") -> dict[str, Any]:
    """Return the function that does it, and what it is told."""
    is_labels = what == "seg"
    kwargs: dict[str, Any] = {}
    if rule.method != "none":
        kwargs = {"is_seg": is_labels, "force_separate_z": _SEPARATE[rule.separate]}
    if rule.method == "spline":
        name = "resample_data_or_seg_to_shape"
        kwargs |= {"order": rule.order, "order_z": 0}
    elif rule.method == "interpolate":
        name = "resample_torch_fornnunet"
        kwargs["memefficient_seg_resampling"] = False
    else:
        name = "no_resampling_hack"
    return {f"resampling_fn_{what}": name, f"resampling_fn_{what}_kwargs": kwargs}


def _architecture(architecture: Architecture) -> dict[str, Any]:
    name, blocks = _NETWORKS[architecture.kind]
    (dimension,) = architecture.num_axes
    kwargs = {
        "n_stages": len(architecture.features),
        "features_per_stage": list(architecture.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": [list(kernel) for kernel in architecture.kernel_sizes],
        "strides": [list(stride) for stride in architecture.strides],
        blocks: list(architecture.blocks_encoder),
        "n_conv_per_stage_decoder": list(reversed(architecture.blocks_decoder)),
        "conv_bias": True,
        **_style(unet_options(architecture), dimension),
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _style(options: UNetOptions, dimension: int) -> dict[str, Any]:
    """Return what a block has beside its convolution."""
    style, has_norm = options.style, options.style.norm != "none"
    activation, activation_kwargs = _ACTIVATIONS[style.activation]
    if style.activation == "leaky_relu" and style.slope != NEGATIVE_SLOPE:
        activation_kwargs = {**activation_kwargs, "negative_slope": style.slope}
    values = {
        "norm_op": f"torch.nn.modules.{_NORMS[style.norm]}{dimension}d" if has_norm else None,
        "norm_op_kwargs": {"eps": style.epsilon, "affine": True} if has_norm else None,
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": f"torch.nn.{activation}",
        "nonlin_kwargs": activation_kwargs,
    }
    return {**values, "nonlin_first": True} if style.activation_first else values


def _intensity(scheme: Normalization, statistics: IntensityStatistics) -> dict[str, float]:
    """Return the statistics of a channel, so that CT normalisation does what the scheme does.

    `quantitative` clips to the foreground's range widened by its length on either side.
    """
    values = statistics.model_dump()
    if scheme == "quantitative":
        low, high = statistics.percentile_00_5, statistics.percentile_99_5
        values |= {"percentile_00_5": low - (high - low), "percentile_99_5": high + (high - low)}
    return values


def _label(entry: int | tuple[int, ...]) -> int | list[int]:
    values = entry if isinstance(entry, tuple) else (entry,)
    return values[0] if len(values) == 1 else list(values)


def _keeps_ignore(scheme: LabelScheme) -> bool:
    """Return whether the ignore label is where nnU-Net wants it, one above all others."""
    return scheme.ignore_label == max(scheme.values[: scheme.ignore_index]) + 1


def _semantics_problems(semantics: Semantics) -> Iterator[str]:
    for field, (expected, reason) in _SEMANTICS.items():
        found = getattr(semantics, field)
        if found != expected:
            yield f"semantics.{field} is {found!r}, expected {expected!r}: {reason}."
    if semantics.previous == "labels_uncropped":
        yield (
            "semantics.previous is 'labels_uncropped', expected 'labels' or 'logits': it crops the "
            "label map of the stage before."
        )


def _architecture_problems(architecture: Architecture) -> Iterator[str]:
    if architecture.kind not in _NETWORKS:
        yield (
            f"architecture.kind is {architecture.kind!r}, expected one of: "
            f"{', '.join(_NETWORKS)}. Train one of them."
        )
        return
    if contradictions := architecture_problems(architecture):
        yield from (f"the architecture contradicts itself: {text}." for text in contradictions)
        return
    options = unet_options(architecture)
    if options.kernel_sizes_decoder != architecture.kernel_sizes[:-1]:
        yield (
            "architecture.options.kernel_sizes_decoder differs from kernel_sizes; there a decoder "
            "stage has the kernel of the encoder's."
        )
    if architecture.kind == "plain_unet":
        return
    if options.kernel_size_stem != architecture.kernel_sizes[0]:
        yield (
            "architecture.options.kernel_size_stem differs from kernel_sizes[0], the kernel that "
            "the stem has there."
        )
    if options.shortcut != "pooled":
        yield f"architecture.options.shortcut is {options.shortcut!r}, expected 'pooled'."
    if options.style.activation_first:
        yield "architecture.options.activation_first is true, which only plain_unet can have there."


def _normalization_problems(model: ForeignModel, configuration: Configuration) -> Iterator[str]:
    for number, scheme in enumerate(configuration.normalization):
        what = f"normalization of channel {number} ({model.spec.channels[number]}) is {scheme!r}"
        std = np.float32(model.plans.intensity[number].std)
        if scheme not in _SCHEMES:
            yield f"{what}, expected one of: {', '.join(_SCHEMES)}."
        elif scheme == "quantitative" and std < _LEAST_STD:
            yield (
                f"{what} and its standard deviation {std:.3g}, expected at least {_LEAST_STD:g}: "
                "below, it divides by that. Give the images a larger unit, and train again."
            )


def _label_problems(scheme: LabelScheme) -> Iterator[str]:
    values = scheme.values[: scheme.ignore_index]
    shown = ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
    advice = "Renumber them, in the segmentations too, and train again."
    largest = _NARROW if scheme.num_foreground < _NARROW_LABELS else _WIDE
    if "ignore" in scheme.labels:
        yield "labels.ignore is a structure, a name kept there for the ignore label. Rename it."
    if scheme.background != 0:
        yield f"labels.background is {scheme.background}, expected 0. {advice}"
    elif not scheme.has_regions and values != tuple(range(len(values))):
        yield f"labels have the values {shown}, expected 0 to {len(values) - 1}. {advice}"
    elif scheme.has_regions and not 0 <= min(values) <= max(values) <= largest:
        yield f"labels have the values {shown}, expected 0 to {largest}. {advice}"
