"""The plans of a model of nnU-Net v1, of every age, checked entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg.errors import BundleError, near_names
from medseg.interop.nnunet.v1_preprocessors import (
    NEVER_SEPARATE,
    PREPROCESSORS,
    REFUSED,
    Preprocessor,
)
from medseg.interop.nnunet.v1_values import (
    Reader,
    entry_of,
    items_of,
    number_of,
    problem_lines,
    whole_number,
)
from medseg.schema.bundle import Resampling
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Normalization

_MOST_VOXELS = 2**28
_LONGEST = 2048
_MOST_POOLINGS = 12
_MOST_CHANNELS = 1024
_MOST_CLASSES = 255
_LARGEST = 1e9
_SMALLEST_SPACING, _LARGEST_SPACING = 1e-6, 1e6

_SCHEMES: dict[str, Normalization] = {"CT": "ct", "CT2": "ct_case", "noNorm": "none"}
"""Any other scheme is a z-score."""
_STATISTICS = {
    "mean": "mean", "sd": "std", "median": "median", "mn": "min", "mx": "max",
    "percentile_00_5": "percentile_00_5", "percentile_99_5": "percentile_99_5",
}  # fmt: skip
_UNUSED = IntensityStatistics(
    mean=0, std=1, median=0, min=0, max=1, percentile_00_5=0, percentile_99_5=1
)
"""Of channels whose intensities were not measured, as none of them needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlans:
    """What a prediction takes from the plans, of one stage; lists per axis in network order."""

    stage: int
    """Number of the stage."""
    num_stages: int
    """Number of stages the plans have; with two, the first is the low resolution."""
    channels: tuple[str, ...]
    """Names of the channels."""
    normalization: tuple[Normalization, ...]
    """Of each channel."""
    use_mask: tuple[bool, ...]
    """Of each channel, whether only the imaged region counts."""
    intensity: tuple[IntensityStatistics, ...]
    """Of each channel."""
    classes: tuple[int, ...]
    """Values of the labels in the training data, without the background."""
    network_axes: tuple[int, int, int]
    """Network axis d is stored axis `network_axes[d]`, in the order I, J, K."""
    patch_size: tuple[int, ...]
    """In voxels."""
    batch_size: int
    """In patches."""
    spacing: tuple[float, float, float]
    """In mm."""
    keeps_slices: bool
    """Whether a 3D configuration keeps the spacing across its slices."""
    strides: tuple[tuple[int, ...], ...]
    """Of each pooling."""
    original_spacing: tuple[float, float, float]
    """Median of the training data, in mm."""
    median_shape: tuple[float, float, float]
    """Median shape of the training data at the target spacing, in voxels."""
    resample_image: Resampling
    """For the image."""
    resample_labels: Resampling
    """For the mask of the imaged region."""
    resample_result: Resampling
    """For the way back."""


def stage_plans(plans: Any, stage: Any, origin: str) -> StagePlans:
    """Check plans and return what a prediction takes from them.

    Args:
        plans: As the pickle holds them; nothing in them is trusted.
        stage: Number of the stage as the trainer holds it; None: the only one.
        origin: What an error calls the plans.

    Raises:
        BundleError: With one line per problem.

    Source:
        The keys of plans of nnU-Net v1, from its first release to 1.7.1.
    """
    reader = Reader()
    found = _read(reader, plans, stage)
    if reader.problems or found is None:
        raise BundleError(problem_lines(origin, reader.problems))
    return found


def _read(reader: Reader, plans: Any, stage: Any) -> StagePlans | None:
    plans = reader.mapping(plans, "plans")
    stages = reader.mapping(plans.get("plans_per_stage"), "plans_per_stage")
    number = _stage_number(reader, stages, stage)
    if not plans or number is None:
        return None
    where = f"plans_per_stage.{number}"
    entry = reader.mapping(entry_of(stages, number), where)
    if not entry:
        return None
    patch = reader.numbers(
        entry.get("patch_size"), f"{where}.patch_size", 1, _LONGEST, lengths=(2, 3), whole=True
    )
    if math.prod(patch) > _MOST_VOXELS:
        reader.refuse(f"{where}.patch_size", list(patch), f"at most {_MOST_VOXELS} voxels")
    spacing, keeps_slices = _spacing(reader, entry, where, plans.get("preprocessor_name"))
    preprocessor = _preprocessor(reader, plans.get("preprocessor_name"), len(patch), keeps_slices)
    num_channels = reader.count(plans.get("num_modalities"), "num_modalities", _MOST_CHANNELS)
    strides = _strides(reader, entry, where, len(patch))
    classes = _classes(reader, plans)
    schemes, masks = _normalizations(reader, plans, num_channels, preprocessor)
    if plans.get("preprocessor_name") == NEVER_SEPARATE and any(masks):
        wanted = "no channel with a mask, which it resizes by cubic splines"
        reader.refuse("use_mask_for_norm", list(masks), f"with {NEVER_SEPARATE} {wanted}")
    intensity = _intensities(reader, plans, schemes)
    axes = _network_axes(reader, plans)
    result = _export_resampling(reader, plans)
    if reader.problems:
        return None
    return StagePlans(
        stage=number,
        num_stages=len(stages),
        channels=_channel_names(plans, num_channels),
        normalization=schemes,
        use_mask=masks,
        intensity=intensity,
        classes=classes,
        network_axes=axes,
        patch_size=tuple(int(size) for size in patch),
        batch_size=_batch_size(entry.get("batch_size")),
        spacing=spacing,
        keeps_slices=len(patch) == 3 and (keeps_slices or preprocessor.keeps_slices),
        strides=strides,
        original_spacing=_about(entry.get("original_spacing"), spacing),
        median_shape=_about(
            entry.get("median_patient_size_in_voxels"), (*((1,) * (3 - len(patch))), *patch)
        ),
        resample_image=preprocessor.resample_image,
        resample_labels=preprocessor.resample_labels,
        resample_result=preprocessor.resample_result or result,
    )


def _stage_number(reader: Reader, stages: Mapping[Any, Any], stage: Any) -> int | None:
    known = sorted({number for key in stages if (number := _stage_key(key)) is not None})
    if stages and len(known) != len(stages):
        reader.refuse("plans_per_stage", list(stages), "stages by their numbers")
        return None
    if stage is None and len(known) == 1:
        return known[0]
    number = whole_number(stage)
    if number in known:
        return number
    if known:
        expected = f"one of the plans' stages: {', '.join(map(str, known))}"
        reader.refuse("the trainer's stage", stage, expected)
    return None


def _stage_key(key: Any) -> int | None:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 5:
        return int(key)
    return whole_number(key)


def _spacing(
    reader: Reader, entry: Mapping[Any, Any], where: str, preprocessor: Any
) -> tuple[tuple[float, float, float], bool]:
    """Return the target spacing, and whether the first axis keeps the image's own."""
    values = entry.get("current_spacing")
    items = items_of(values) or []
    keeps = False
    if preprocessor == "PreprocessorFor3D_LeaveOriginalZSpacing" and len(items) == 3:
        first = items[0]
        keeps = first is None or (isinstance(first, float) and math.isnan(first))
        if keeps:
            values = [_about(entry.get("original_spacing"), (1.0, 1.0, 1.0))[0], *items[1:]]
    found = reader.numbers(
        values, f"{where}.current_spacing", _SMALLEST_SPACING, _LARGEST_SPACING, lengths=(3,)
    )
    return _three(found, 1.0), keeps


def _preprocessor(reader: Reader, name: Any, num_axes: int, keeps_slices: bool) -> Preprocessor:
    if name is None:  # plans of the first releases
        name = "GenericPreprocessor" if num_axes == 3 else "PreprocessorFor2D"
    if not isinstance(name, str) or name not in PREPROCESSORS:
        known = sorted(PREPROCESSORS)
        reason = f" ({REFUSED[name]})" if isinstance(name, str) and name in REFUSED else ""
        close = near_names(name, known) if isinstance(name, str) and not reason else ""
        reader.refuse("preprocessor_name", name, f"one of: {', '.join(known)}{reason}.{close}")
        return Preprocessor()
    found = PREPROCESSORS[name]
    is_flat = keeps_slices or found.keeps_slices or found.resample_image.method == "none"
    if num_axes == 2 and not is_flat:
        reader.refuse("preprocessor_name", name, "one for a 2D network, which leaves slices alone")
    return found


def _strides(
    reader: Reader, entry: Mapping[Any, Any], where: str, num_axes: int
) -> tuple[tuple[int, ...], ...]:
    """Return the stride of each pooling; plans of the first releases only count the poolings."""
    values = entry.get("pool_op_kernel_sizes")
    lengths = (num_axes,) if num_axes else (2, 3)
    if values is None:
        name = f"{where}.num_pool_per_axis"
        counts = reader.numbers(
            entry.get("num_pool_per_axis"), name, 0, _MOST_POOLINGS, lengths=lengths, whole=True
        )
        most = int(max(counts, default=0))
        return tuple(
            tuple(2 if most - count <= step else 1 for count in counts) for step in range(most)
        )
    name = f"{where}.pool_op_kernel_sizes"
    rows = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(rows, (list, tuple)) or not 1 <= len(rows) <= _MOST_POOLINGS:
        reader.refuse(name, values, f"1 to {_MOST_POOLINGS} strides")
        return ()
    return tuple(
        tuple(map(int, reader.numbers(row, f"{name}.{step}", 1, 64, lengths=lengths, whole=True)))
        for step, row in enumerate(rows)
    )


def _classes(reader: Reader, plans: Mapping[Any, Any]) -> tuple[int, ...]:
    """Return the values of the labels; what counts is their number, which the network has."""
    count = reader.count(plans.get("num_classes"), "num_classes", _MOST_CLASSES)
    values = [number_of(value) for value in items_of(plans.get("all_classes")) or ()]
    whole = tuple(int(value) for value in values if value is not None)
    return whole if len(whole) == len(values) == count else tuple(range(1, count + 1))


def _channel_names(plans: Mapping[Any, Any], count: int) -> tuple[str, ...]:
    names = plans.get("modalities")
    found = [entry_of(names, i) if isinstance(names, Mapping) else None for i in range(count)]
    return tuple(
        name if isinstance(name, str) and 0 < len(name) <= 100 else f"channel_{number}"
        for number, name in enumerate(found)
    )


def _normalizations(
    reader: Reader, plans: Mapping[Any, Any], count: int, preprocessor: Preprocessor
) -> tuple[tuple[Normalization, ...], tuple[bool, ...]]:
    if preprocessor.normalization is not None:
        return (preprocessor.normalization,) * count, (False,) * count
    schemes = reader.mapping(plans.get("normalization_schemes"), "normalization_schemes")
    masks = reader.mapping(plans.get("use_mask_for_norm"), "use_mask_for_norm")
    found: list[Normalization] = []
    used: list[bool] = []
    for number in range(count):
        scheme, mask = entry_of(schemes, number), entry_of(masks, number)
        if schemes and not isinstance(scheme, str):
            reader.refuse(f"normalization_schemes.{number}", scheme, "the name of a scheme")
        found.append(_SCHEMES.get(scheme, "zscore") if isinstance(scheme, str) else "none")
        if masks and not isinstance(mask, (bool, np.bool_)):
            reader.refuse(f"use_mask_for_norm.{number}", mask, "True or False")
        used.append(bool(mask))
    return tuple(found), tuple(used)


def _intensities(
    reader: Reader, plans: Mapping[Any, Any], schemes: Sequence[Normalization]
) -> tuple[IntensityStatistics, ...]:
    """Return the statistics of each channel; only CT channels must have them."""
    properties = plans.get("dataset_properties")
    all_channels = (
        properties.get("intensityproperties") if isinstance(properties, Mapping) else None
    )
    values = all_channels if isinstance(all_channels, Mapping) else {}
    found = []
    for number, scheme in enumerate(schemes):
        where = f"dataset_properties.intensityproperties.{number}"
        channel = entry_of(values, number)
        if scheme in ("ct", "ct_case"):
            found.append(_statistics(reader, channel, where, scheme))
        else:
            found.append(_statistics(Reader(), channel, where, scheme))
    return tuple(found)


def _statistics(
    reader: Reader, channel: Any, where: str, scheme: Normalization
) -> IntensityStatistics:
    channel = reader.mapping(channel, where)
    if not channel:
        return _UNUSED
    known = {theirs: number_of(channel.get(theirs)) for theirs in _STATISTICS}
    low, high = known["percentile_00_5"], known["percentile_99_5"]
    needed = {"percentile_00_5", "percentile_99_5", *(("mean", "sd") if scheme == "ct" else ())}
    for theirs in sorted(needed):
        if (value := known[theirs]) is None or abs(value) > _LARGEST:
            reader.refuse(f"{where}.{theirs}", channel.get(theirs), "a number")
    if scheme == "ct" and (known["sd"] or 0) <= 0 and known["sd"] is not None:
        reader.refuse(f"{where}.sd", channel.get("sd"), "a number above 0, CT is divided by it")
    if low is not None and high is not None and low >= high:
        reader.refuse(where, [low, high], "a 0.5th percentile below the 99.5th")
    if any(value is None for value in known.values()):
        known = {name: 0.0 if value is None else value for name, value in known.items()}
    return IntensityStatistics.model_validate(
        {ours: known[theirs] for theirs, ours in _STATISTICS.items()}
    )


def _network_axes(reader: Reader, plans: Mapping[Any, Any]) -> tuple[int, int, int]:
    """Return the axes of the network; they are as stored where either direction is missing."""
    forward, backward = plans.get("transpose_forward"), plans.get("transpose_backward")
    if forward is None or backward is None:
        return (2, 1, 0)
    there = [number_of(axis) for axis in items_of(forward) or ()]
    back = [number_of(axis) for axis in items_of(backward) or ()]
    if sorted(map(str, there)) != ["0.0", "1.0", "2.0"]:
        reader.refuse("transpose_forward", forward, "the axes 0, 1 and 2 in some order")
        return (2, 1, 0)
    axes = [int(axis) for axis in there if axis is not None]
    if back != [float(axes.index(axis)) for axis in range(3)]:
        reader.refuse("transpose_backward", backward, "the reverse of transpose_forward")
    return (2 - axes[0], 2 - axes[1], 2 - axes[2])


def _export_resampling(reader: Reader, plans: Mapping[Any, Any]) -> Resampling:
    name = "segmentation_export_params"
    if name not in plans:
        return Resampling()
    values = reader.mapping(plans[name], name)
    if not values:
        return Resampling()
    force, order = values.get("force_separate_z"), whole_number(values.get("interpolation_order"))
    if force is not None and not isinstance(force, (bool, np.bool_)):
        reader.refuse(f"{name}.force_separate_z", force, "None, True or False")
    separate: Any = "auto" if force is None else "always" if force else "never"
    if order not in (0, 1, 3):
        reader.refuse(f"{name}.interpolation_order", values.get("interpolation_order"), "0, 1 or 3")
        return Resampling()
    across = whole_number(values.get("interpolation_order_z"))
    if across != 0 and separate != "never":
        wanted = "0, the nearest slice"
        reader.refuse(f"{name}.interpolation_order_z", values.get("interpolation_order_z"), wanted)
    return Resampling.model_validate({"order": order, "separate": separate})


def _batch_size(value: Any) -> int:
    """Return a number that only informs, or 1 where it makes no sense."""
    number = number_of(value) or 0
    return int(number) if 1 <= number <= _LARGEST else 1


def _about(values: Any, instead: Sequence[float]) -> tuple[float, float, float]:
    """Return three positive numbers that only inform, or others where they make no sense."""
    found = [number_of(value) for value in items_of(values) or ()]
    sound = [value for value in found if value is not None and 0 < value <= _LARGEST]
    return _three(sound if len(sound) == len(found) == 3 else instead, 1.0)


def _three(values: Sequence[float], instead: float) -> tuple[float, float, float]:
    first, second, third = [value or instead for value in (*values, 0, 0, 0)][:3]
    return (float(first), float(second), float(third))
