"""From a fingerprint to plans: every decision that needs no training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.errors import PlanError
from medseg.plan.channels import describe_channels
from medseg.plan.decide import Decisions, decide
from medseg.plan.frame import find_frame
from medseg.plan.presets import Preset, get_preset
from medseg.plan.reasons import explain
from medseg.plan.sides import explain_left_right, find_left_right
from medseg.plan.sizing import Budget, architecture
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint
from medseg.schema.plans import Configuration, Plans

_CASCADE = "3d_cascade_fullres"


def make_plans(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    *,
    name: str = "nnunet",
    gpu_memory_gb: float | None = None,
    target_spacing: Sequence[float] | None = None,
    quantitative: bool = True,
) -> Plans:
    """Plan every configuration of a data set.

    Args:
        fingerprint: Statistics of the raw data set.
        spec: Channels and labels.
        name: Preset: `nnunet`, `resenc_m`, `resenc_l`, `resenc_xl` or `cpu`.
        gpu_memory_gb: GPU memory to fill in training; None takes the preset's.
        target_spacing: Voxel size in mm on canonical axes (I, J, K), instead of the planner's.
        quantitative: Normalise parameter maps, known by their names, with the data set's
            statistics; if not, channel names mean what they mean to nnU-Net.

    Returns:
        The plans: `2d`; unless the images are single slices also `3d_fullres`; where its patch
        sees too little of an image also `3d_lowres` and `3d_cascade_fullres`.

    Raises:
        ConfigError: If there is no preset of that name.
        PlanError: If fingerprint and data set do not fit each other, or nothing fits the memory.

    Source:
        Behaviour of nnU-Net 2.8.1 `ExperimentPlanner` and its ResEnc planners; `cpu` is our own.
    """
    preset = get_preset(name)
    _check(fingerprint, spec, _cost_problems(preset, gpu_memory_gb, target_spacing))
    budget = Budget(
        preset=preset,
        memory_gb=preset.memory_gb if gpu_memory_gb is None else gpu_memory_gb,
        num_logits=_count_labels(spec),
        num_cases=len(fingerprint.cases),
        num_inputs=len(spec.channels),
    )
    channels = describe_channels(spec.channels, fingerprint.channels, quantitative=quantitative)
    decisions = decide(
        find_frame(fingerprint, target_spacing),
        budget,
        channels=channels,
        kept_share=fingerprint.median_relative_size_after_cropping,
    )
    configurations = _configurations(decisions)
    asked = None if target_spacing is None else _three(target_spacing)
    return Plans(
        name=name,
        dataset=spec.name,
        network_axes=decisions.frame.network_axes,
        original_median_spacing=decisions.frame.original_spacing,
        original_median_shape=decisions.frame.original_shape,
        intensity=fingerprint.channels,
        configurations=configurations,
        inherits={_CASCADE: "3d_fullres"} if _CASCADE in configurations else {},
        left_right=find_left_right(spec, decisions.frame.network_axes),
        asked_gpu_memory_gb=gpu_memory_gb,
        asked_target_spacing=asked,
        why=(*explain(decisions), *explain_left_right(spec)),
    )


def _count_labels(spec: DatasetSpec) -> int:
    """Return the output channels the memory estimate reckons with: every entry of the labels.

    Source:
        nnU-Net 2.8.1 counts background, regions and the ignore label alike.
    """
    is_listed = spec.ignore_label is None or spec.ignore_label in spec.labels.values()
    return len(spec.labels) + (0 if is_listed else 1)


def _configurations(decisions: Decisions) -> dict[str, Configuration]:
    found = {key: _configuration(decisions, key) for key in decisions.sizings}
    if "3d_lowres" in found:
        found[_CASCADE] = found["3d_fullres"].model_copy(update={"previous_stage": "3d_lowres"})
    return found


def _configuration(decisions: Decisions, key: str) -> Configuration:
    sizing = decisions.sizings[key]
    return Configuration(
        patch_size=sizing.patch_size,
        batch_size=sizing.batch_size,
        spacing=sizing.spacing,
        median_shape=sizing.median_shape,
        normalization=decisions.normalization,
        use_mask_for_norm=decisions.masks,
        batch_dice=decisions.batch_dice[key],
        architecture=architecture(sizing.topology, decisions.budget.preset),
    )


def _check(fingerprint: Fingerprint, spec: DatasetSpec, problems: list[str]) -> None:
    """Raise one PlanError with everything that makes planning impossible."""
    found = []
    if not fingerprint.cases:
        found.append("the fingerprint holds no case; expected at least one. Run it again.")
    if len(fingerprint.channels) != len(spec.channels):
        found.append(
            f"the fingerprint has {len(fingerprint.channels)} channels, the data set "
            f"{len(spec.channels)} ({', '.join(spec.channels)}). Run the fingerprint again."
        )
    found += [
        f"case {case_id!r} has spacing {case.spacing} mm and cropped shape {case.shape_cropped}; "
        "expected positive numbers. Correct its header."
        for case_id, case in fingerprint.cases.items()
        if not all(_is_positive(v) for v in (*case.spacing, *case.shape_cropped))
    ]
    found += problems
    if found:
        raise PlanError("\n".join([f"cannot plan {spec.name!r}:", *(f"  {p}" for p in found)]))


def _cost_problems(
    preset: Preset, gpu_memory_gb: float | None, target_spacing: Sequence[float] | None
) -> list[str]:
    """Return what is wrong with the options."""
    problems = []
    if gpu_memory_gb is not None and not _is_positive(gpu_memory_gb):
        problems.append(f"GPU memory is {gpu_memory_gb} GB; expected a positive number.")
    elif gpu_memory_gb is not None and math.isfinite(preset.max_operations):
        problems.append(
            f"GPU memory is {gpu_memory_gb:g} GB, but {preset.name!r} plans for a machine without "
            "GPU. Leave it out, or take another preset."
        )
    if target_spacing is not None and (problem := target_spacing_problem(target_spacing)):
        problems.append(problem)
    return problems


def target_spacing_problem(spacing: Sequence[float]) -> str | None:
    """Return what is wrong with a voxel size that is asked for, None if nothing is."""
    if len(spacing) == 3 and all(_is_positive(value) for value in spacing):
        return None
    return f"target spacing is {tuple(spacing)}; expected 3 positive numbers (I, J, K), in mm."


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c
