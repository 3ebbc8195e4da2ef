"""From the plans of nnU-Net v2 to medseg's: one configuration, its network and its semantics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medseg.errors import near_names
from medseg.interop.nnunet.v2_files import (
    NORMALIZATIONS,
    ORIENTATIONS,
    ConfigurationEntry,
    EarlyEntry,
    PlansFile,
    RecentEntry,
)
from medseg.interop.nnunet.v2_network import NETWORKS, NetworkEntry
from medseg.interop.nnunet.v2_values import checked, printable, shown
from medseg.schema.base import is_number
from medseg.schema.bundle import Orientation, Semantics
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans

Entry = RecentEntry | EarlyEntry
_GAUSSIAN_PEAK = 10.0
_OF_A_CT = ("mean", "std", "percentile_00_5", "percentile_99_5")
_LARGEST = 1e9
_MOST_ANCESTORS = 32


def read_entry(raw: Any, name: str, where: str, problems: list[str]) -> Entry | None:
    """Return one configuration with all that it inherits, checked; None after noting problems.

    Args:
        raw: Content of `plans.json`.
        name: Name of the configuration.
        where: What messages call the file.
        problems: Where problems are added, in words.
    """
    entries = raw.get("configurations") if isinstance(raw, dict) else None
    if not isinstance(entries, dict):
        problems.append(f"{where}.configurations: got {shown(entries)}; expected configurations")
        return None
    if name not in entries:
        known = [printable(str(known)) for known in entries]
        problems.append(
            f"{where}.configurations: {shown(name)} is missing; expected one of: "
            f"{', '.join(known)}.{near_names(name, known)}"
        )
        return None
    values = _inherited(entries, name, where, problems)
    if values is None:
        return None
    kind: type[RecentEntry] | type[EarlyEntry]
    kind = RecentEntry if "architecture" in values else EarlyEntry
    place = f"{where}.configurations.{printable(name)}"
    entry = checked(kind, values, place, problems)
    if entry is None:
        return None
    contradictions = _contradictions(entry, place)
    problems += contradictions
    return None if contradictions else entry


def _inherited(
    entries: Mapping[str, Any], name: str, where: str, problems: list[str]
) -> dict[str, Any] | None:
    """Return a configuration's keys and those it takes from others; its own come first."""
    values: dict[str, Any] = {}
    seen: list[str] = []
    following: Any = name
    while following is not None:
        place = f"{where}.configurations.{printable(seen[-1] if seen else name)}.inherits_from"
        if not isinstance(following, str) or not isinstance(entries.get(following), dict):
            problems.append(f"{place}: got {shown(following)}; expected another configuration")
            return None
        if following in seen:
            circle = printable(" -> ".join([*seen, following]))
            problems.append(f"{place}: configurations inherit in a circle ({circle})")
            return None
        if len(seen) == _MOST_ANCESTORS:
            problems.append(f"{place}: more than {_MOST_ANCESTORS} configurations inherit in a row")
            return None
        seen.append(following)
        values = {**entries[following], **values}
        following = entries[following].get("inherits_from")
    return values


def _contradictions(entry: Entry, where: str) -> list[str]:
    """Return where the network does not fit the patch or itself, in words."""
    arguments, place = entry.network.arch_kwargs, f"{where}.architecture.arch_kwargs"
    if arguments.num_axes != len(entry.patch_size):
        return [
            f"{place}.conv_op: got {arguments.conv_op}; patch_size has {len(entry.patch_size)} "
            "entries"
        ]
    problems = []
    if arguments.nonlin_first and entry.network.network_class_name != "PlainConvUNet":
        problems.append(f"{place}.nonlin_first: got True; expected false in a residual network")
    for axis, size in enumerate(entry.patch_size):
        product = math.prod(stride[axis] for stride in arguments.strides)
        if size % product:
            problems.append(
                f"{where}.patch_size.{axis}: got {size}; expected a multiple of {product}, the "
                "product of its strides"
            )
    return problems


def architecture_of(network: NetworkEntry, *, is_batch_norm: bool) -> Architecture:
    """Return the network in medseg's terms.

    Args:
        network: As the plans describe it.
        is_batch_norm: Whether the weights are those of batch norms, whatever the plans say: there
            is a trainer that exchanges the norms.
    """
    arguments = network.arch_kwargs
    norm = "batch" if is_batch_norm else arguments.norm
    options: dict[str, Any] = {
        "norm": norm,
        "epsilon": arguments.epsilon if norm == arguments.norm != "none" else 1e-5,
        "activation": arguments.activation,
        "slope": arguments.slope if arguments.activation == "leaky_relu" else 0.01,
        "activation_first": arguments.nonlin_first and norm != "none",
    }
    usual = {
        "norm": "instance", "epsilon": 1e-5, "activation": "leaky_relu", "slope": 0.01,
        "activation_first": False,
    }  # fmt: skip
    return Architecture(
        kind=NETWORKS[network.network_class_name],
        features=arguments.features_per_stage,
        kernel_sizes=arguments.kernel_sizes,
        strides=arguments.strides,
        blocks_encoder=network.blocks_encoder,
        blocks_decoder=arguments.n_conv_per_stage_decoder[::-1],
        options={name: value for name, value in options.items() if value != usual[name]},
    )


def plans_of(
    file: PlansFile,
    entry: Entry,
    name: str,
    *,
    dataset: str,
    architecture: Architecture,
    intensity: tuple[IntensityStatistics, ...],
) -> Plans:
    """Return plans with one configuration."""
    axes = [2 - axis for axis in file.transpose_forward]
    patch = entry.patch_size
    flat = (1.0,) * (3 - len(patch))
    median = _lengths(entry.median_image_size_in_voxels, patch)
    configuration = Configuration(
        patch_size=patch,
        batch_size=entry.batch_size,
        spacing=entry.spacing,
        median_shape=median,
        normalization=tuple(NORMALIZATIONS[scheme] for scheme in entry.normalization_schemes),
        use_mask_for_norm=entry.use_mask_for_norm,
        batch_dice=entry.batch_dice,
        architecture=architecture,
        previous_stage=entry.previous_stage,
    )
    spacing = _lengths(file.original_median_spacing_after_transp, (*flat, *entry.spacing))
    shape = _lengths(file.original_median_shape_after_transp, (*flat, *median))
    return Plans(
        name=file.plans_name or "nnUNetPlans",
        dataset=dataset,
        network_axes=(axes[0], axes[1], axes[2]),
        original_median_spacing=(spacing[0], spacing[1], spacing[2]),
        original_median_shape=(shape[0], shape[1], shape[2]),
        intensity=intensity,
        configurations={name: configuration},
    )


def _lengths(values: Any, instead: Sequence[float]) -> tuple[float, ...]:
    """Return positive numbers that only inform, or others where they make no sense."""
    if not isinstance(values, list) or len(values) != len(instead):
        return tuple(float(value) for value in instead)
    is_sound = all(is_number(value) and 0 < value <= _LARGEST for value in values)
    return tuple(float(value) for value in (values if is_sound else instead))


def intensity_of(
    raw: Mapping[str, Any], entry: ConfigurationEntry, where: str, problems: list[str]
) -> tuple[IntensityStatistics, ...]:
    """Return the intensity statistics of each channel; only CT channels must have them.

    Args:
        raw: Content of `plans.json`.
        entry: The configuration.
        where: What messages call the file.
        problems: Where problems are added, in words.
    """
    key = "foreground_intensity_properties_per_channel"
    if key not in raw and "foreground_intensity_properties_by_modality" in raw:
        key = "foreground_intensity_properties_by_modality"
    channels = raw.get(key)
    channels = channels if isinstance(channels, dict) else {}
    result = []
    for number, scheme in enumerate(entry.normalization_schemes):
        values = channels.get(str(number))
        values = values if isinstance(values, dict) else {}
        sound = {n: float(v) for n, v in values.items() if is_number(v) and abs(v) <= _LARGEST}
        if scheme == "CTNormalization":
            problems += [
                f"{where}.{key}.{number}.{name}: got {shown(values.get(name))}; expected a number, "
                "which CTNormalization needs"
                for name in _OF_A_CT
                if name not in sound
            ]
        known = {name: sound.get(name, 0.0) for name in IntensityStatistics.model_fields}
        result.append(IntensityStatistics.model_validate(known))
    return tuple(result)


def semantics_of(
    entry: ConfigurationEntry, mirror_axes: tuple[int, ...], *, has_regions: bool
) -> Semantics:
    """Return how predictions are put together.

    Source:
        nnU-Net v2: mean of logits in half precision, resampled, then activated.
    """
    image, labels, result = entry.resampling
    return Semantics(
        average="logits",
        activation="sigmoid" if has_regions else "softmax",
        normalise_first=True,
        accumulator="float16",
        gaussian_peak=_GAUSSIAN_PEAK,
        label_resize="argmax",
        mirror_axes=mirror_axes,
        previous="logits" if entry.previous_stage is None else "labels",
        resample_image=image,
        resample_labels=labels,
        resample_result=result,
    )


def orientation_of(
    file: PlansFile, overwritten: str | None, where: str, problems: list[str], notes: list[str]
) -> Orientation:
    """Return the frame images are brought to.

    The plans decide, as they do when nnU-Net predicts; what `dataset.json` asks for went into them
    when they were made, and counts where they say nothing.
    """
    if overwritten == "None":
        overwritten = None
    name = file.image_reader_writer or overwritten
    if name not in ORIENTATIONS:
        known = list(ORIENTATIONS)
        problems.append(
            f"{where}.image_reader_writer: got {shown(name)}; expected one of: {', '.join(known)}."
            f"{near_names(str(name), known)}"
        )
        return "stored_sitk"
    if overwritten not in (None, name):
        notes.append(
            f"dataset.json asks for the reader {overwritten}, the plans for {name}; nnU-Net "
            "predicts with the latter."
        )
    return ORIENTATIONS[name]
