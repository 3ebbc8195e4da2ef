"""The reasons of a plan's decisions, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from medseg.plan.decide import MASK_SHARE, SMALL_COVERAGE, WORTHWHILE_REDUCTION, Decisions
from medseg.plan.frame import ANISOTROPY, Frame
from medseg.plan.presets import MIN_BATCH
from medseg.schema.plans import Normalization

AXIS_NAMES = ("I (left-right)", "J (posterior-anterior)", "K (inferior-superior)")
"""Canonical axes in words."""
NORMALIZATION_WORDS: dict[Normalization, str] = {
    "zscore": "is z-scored in every case",
    "ct": "is clipped to the data set's 0.5 and 99.5 percentiles and z-scored with the data set's "
    "mean and standard deviation",
    "quantitative": "is z-scored with the data set's mean and standard deviation, after clipping "
    "to the data set's 0.5 and 99.5 percentiles, widened on both sides by their distance",
    "none": "is left as it is",
    "ct_case": "is clipped to the range of the foreground and scaled by its own values in it",
    "rescale_0_1": "is scaled to the range 0 to 1 in every case",
    "rgb_0_1": "is divided by 255",
}
"""What is done to a channel."""


def explain(decisions: Decisions) -> tuple[str, ...]:
    """Return one sentence for each decision, in the order they were made."""
    return (
        _of_spacing(decisions.frame),
        _of_axes(decisions.frame),
        *_of_time(decisions),
        *(
            sentence
            for key in decisions.sizings
            for sentence in (_of_patch(decisions, key), _of_batch(decisions, key))
        ),
        _of_low_resolution(decisions),
        *_of_normalization(decisions),
        _of_masks(decisions),
        *_of_batch_dice(decisions),
    )


def _by(values: Sequence[float], digits: int = 4) -> str:
    return " x ".join(f"{value:.{digits}g}" for value in values)


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.01 else "less than 1%"


def _of_time(decisions: Decisions) -> Iterator[str]:
    if decisions.budget.is_timed:
        yield (
            "Made for a machine without GPU: what a training step may cost is counted in additions "
            f"and multiplications, {decisions.budget.words}, about 1.5 s on two processor cores."
        )


def _of_spacing(frame: Frame) -> str:
    target = f"Target voxel size {_by(frame.spacing)} mm"
    if frame.is_given:
        return f"{target}: as asked for."
    cases = f"{frame.num_cases} case{'s' if frame.num_cases > 1 else ''}"
    if frame.fine_axis is None:
        return f"{target}: the median of {cases}."
    return (
        f"{target}: the median of {cases}, but along the first axis, more than {ANISOTROPY:g} "
        f"times coarser and shorter than the others (median "
        f"{frame.original_spacing[frame.fine_axis]:.4g} mm), the 10th percentile, so that cases "
        "with thin slices keep them."
    )


def _of_axes(frame: Frame) -> str:
    order = ", ".join(AXIS_NAMES[axis] for axis in frame.network_axes)
    if frame.is_flat:
        return f"Axis order {order}: the images are single slices across the first axis."
    return f"Axis order {order}: the axis with the largest voxels comes first."


def _of_patch(decisions: Decisions, key: str) -> str:
    sizing = decisions.sizings[key]
    patch = f"{key}: patch {_by(sizing.patch_size)}, {_share(sizing.coverage)} of the median image"
    batch = decisions.budget.patches_to_fit(len(sizing.patch_size))
    image = f"{_by(sizing.median_shape)} at {_by(sizing.spacing)} mm"
    if sizing.patch_size == sizing.first_patch:
        return (
            f"{patch} ({image}): nothing had to be cut, for a batch of {batch} fits "
            f"{decisions.budget.words}."
        )
    return (
        f"{patch} ({image}): cut from {_by(sizing.first_patch)}, always along the axis that "
        f"covered most of the image, until a batch of {batch} fitted "
        f"{decisions.budget.words}."
    )


def _of_batch(decisions: Decisions, key: str) -> str:
    sizing, share = decisions.sizings[key], decisions.budget.preset.max_dataset_share
    batch = f"{key}: batch size {sizing.batch_size}"
    limits = (sizing.batch_by_cost, sizing.batch_by_dataset)
    limiting = "the time of a step" if decisions.budget.is_timed else "the memory"
    if min(limits) < MIN_BATCH:
        cause = limiting if limits[0] < MIN_BATCH else f"{share:.0%} of the data set's voxels"
        return f"{batch}: the smallest allowed, though {cause} would hold only {min(limits)}."
    if limits[0] <= limits[1]:
        return f"{batch}: as many patches as fit {decisions.budget.words}."
    return (
        f"{batch}: a step may see at most {share:.0%} of the data set's voxels ({limiting} "
        f"would allow {limits[0]})."
    )


def _of_low_resolution(decisions: Decisions) -> str:
    full = decisions.sizings.get("3d_fullres")
    if full is None:
        return "No 3D configuration: the images are single slices."
    covers = f"a 3d_fullres patch covers {_share(full.coverage)} of the median image"
    if low := decisions.sizings.get("3d_lowres"):
        return (
            f"3d_lowres and 3d_cascade_fullres: {covers}, less than {SMALL_COVERAGE:.0%}, so that "
            f"a first stage with voxels of {_by(low.spacing)} mm, the finest whose patch covers "
            "that much, gives the context."
        )
    if decisions.rejected is not None:
        return (
            f"No 3d_lowres: {covers}, but the stage that covers {SMALL_COVERAGE:.0%} (voxels of "
            f"{_by(decisions.rejected.spacing)} mm) has not even {WORTHWHILE_REDUCTION:g} times "
            "fewer voxels than full resolution."
        )
    return f"No 3d_lowres: {covers}, at least {SMALL_COVERAGE:.0%}."


def _of_normalization(decisions: Decisions) -> Iterator[str]:
    for channel in decisions.channels:
        what = NORMALIZATION_WORDS[channel.scheme]
        yield f"Channel {channel.name!r} {what}, {channel.reason}."


def _of_masks(decisions: Decisions) -> str:
    leaves = f"cropping to the non-zero box leaves {decisions.kept_share:.0%} of a case's voxels"
    if any(decisions.masks):
        return (
            "Z-score statistics come from the non-zero voxels alone and the rest stays zero, for "
            f"{leaves}, less than {MASK_SHARE:.0%}."
        )
    if "zscore" in decisions.normalization:
        return f"Z-score statistics come from the whole cropped image, for {leaves}."
    return f"No normalisation uses the non-zero mask, for no channel is z-scored ({leaves})."


def _of_batch_dice(decisions: Decisions) -> Iterator[str]:
    pooled = [key for key, flag in decisions.batch_dice.items() if flag]
    single = [key for key, flag in decisions.batch_dice.items() if not flag]
    if "3d_lowres" in decisions.sizings:
        pooled.append("3d_cascade_fullres")
    yield (
        f"Batch Dice in {', '.join(pooled)}: a patch shows so little of a case that the Dice of "
        "one sample is unreliable."
    )
    if single:
        yield f"Dice of each sample in {', '.join(single)}: a patch shows a good part of a case."
