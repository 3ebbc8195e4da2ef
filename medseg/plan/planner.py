"""From a fingerprint to plans: every decision that needs no training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.errors import PlanError
from medseg.plan.decide import Decisions, decide
from medseg.plan.frame import find_frame
from medseg.plan.presets import get_preset
from medseg.plan.reasons import explain
from medseg.plan.sizing import Budget, features_per_stage
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint
from medseg.schema.plans import Architecture, Configuration, Plans


def make_plans(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    *,
    name: str = "nnunet",
    gpu_memory_gb: float | None = None,
    target_spacing: Sequence[float] | None = None,
) -> Plans:
    """Plan every configuration of a data set.

    Args:
        fingerprint: Statistics of the raw data set.
        spec: Channels and labels.
        name: Preset: `nnunet`, `resenc_m`, `resenc_l` or `resenc_xl`.
        gpu_memory_gb: GPU memory to fill in training; None takes the preset's.
        target_spacing: Voxel size in mm on canonical axes (I, J, K), instead of the planner's.

    Returns:
        The plans: `2d`; unless the images are single slices also `3d_fullres`; where its patch
        sees too little of an image also `3d_lowres` and `3d_cascade_fullres`.

    Raises:
        ConfigError: If there is no preset of that name.
        PlanError: If fingerprint and data set do not fit each other, or nothing fits the memory.

    Source:
        Behaviour of nnU-Net 2.8.1 `ExperimentPlanner` and its ResEnc planners.
    """
    preset = get_preset(name)
    _check(fingerprint, spec, gpu_memory_gb, target_spacing)
    budget = Budget(
        preset=preset,
        memory_gb=preset.memory_gb if gpu_memory_gb is None else gpu_memory_gb,
        num_logits=_count_labels(spec),
        num_cases=len(fingerprint.cases),
    )
    decisions = decide(
        find_frame(fingerprint, target_spacing),
        budget,
        channels=spec.channels,
        kept_share=fingerprint.median_relative_size_after_cropping,
    )
    return Plans(
        name=name,
        dataset=spec.name,
        network_axes=decisions.frame.network_axes,
        original_median_spacing=decisions.frame.original_spacing,
        original_median_shape=decisions.frame.original_shape,
        intensity=fingerprint.channels,
        configurations=_configurations(decisions),
        why=explain(decisions),
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
        found["3d_cascade_fullres"] = found["3d_fullres"].model_copy(
            update={"previous_stage": "3d_lowres"}
        )
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
        architecture=_architecture(decisions, key),
    )


def _architecture(decisions: Decisions, key: str) -> Architecture:
    topology, preset = decisions.sizings[key].topology, decisions.budget.preset
    num_stages = len(topology.strides)
    blocks_encoder, blocks_decoder = preset.blocks(num_stages)
    return Architecture(
        kind=preset.kind,
        features=features_per_stage(num_stages, len(topology.patch_size)),
        kernel_sizes=topology.kernel_sizes,
        strides=topology.strides,
        blocks_encoder=blocks_encoder,
        blocks_decoder=blocks_decoder,
    )


def _check(
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    gpu_memory_gb: float | None,
    target_spacing: Sequence[float] | None,
) -> None:
    """Raise one PlanError with everything that makes planning impossible."""
    problems = []
    if not fingerprint.cases:
        problems.append("the fingerprint holds no case; expected at least one. Run it again.")
    if len(fingerprint.channels) != len(spec.channels):
        problems.append(
            f"the fingerprint has {len(fingerprint.channels)} channels, the data set "
            f"{len(spec.channels)} ({', '.join(spec.channels)}). Run the fingerprint again."
        )
    problems += [
        f"case {case_id!r} has spacing {case.spacing} mm and cropped shape {case.shape_cropped}; "
        "expected positive numbers. Correct its header."
        for case_id, case in fingerprint.cases.items()
        if not all(_is_positive(v) for v in (*case.spacing, *case.shape_cropped))
    ]
    if gpu_memory_gb is not None and not _is_positive(gpu_memory_gb):
        problems.append(f"GPU memory is {gpu_memory_gb} GB; expected a positive number.")
    if target_spacing is not None and not (
        len(target_spacing) == 3 and all(_is_positive(v) for v in target_spacing)
    ):
        problems.append(
            f"target spacing is {tuple(target_spacing)}; expected 3 positive numbers "
            "(I, J, K), in mm."
        )
    if problems:
        raise PlanError("\n".join([f"cannot plan {spec.name!r}:", *(f"  {p}" for p in problems)]))


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
