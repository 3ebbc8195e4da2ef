"""Plans of a trained model, taken over for another data set: for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from medseg.errors import PlanError
from medseg.plan.sides import explain_left_right, find_left_right
from medseg.resample import new_shape
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint, IntensityStatistics
from medseg.schema.plans import Configuration, Plans

FAR_SPACING = 2.0
"""A data set whose voxels differ by more than this factor from the model's deserves a warning."""
FAR_MEAN = 3.0
"""So does one whose mean intensity lies this many standard deviations from the model's."""


def plan_from(
    bundle_plans: Plans,
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    *,
    bundle_channels: Sequence[str] | None = None,
) -> Plans:
    """Return the plans of a trained model for another data set.

    What the weights depend on is the model's: axis order, voxel size, patch, batch, network,
    normalisation and its statistics. Medians are the data set's, and its labels decide about
    mirroring.

    Args:
        bundle_plans: Plans of the model.
        fingerprint: Statistics of the data set.
        spec: Channels and labels of the data set.
        bundle_channels: Channel names of the model, where known.

    Raises:
        PlanError: If the model cannot take images of this data set.
    """
    _check(bundle_plans, fingerprint, spec, bundle_channels)
    axes = bundle_plans.network_axes
    shapes = [[case.shape_cropped[axis] for axis in axes] for case in fingerprint.cases.values()]
    spacings = [[case.spacing[axis] for axis in axes] for case in fingerprint.cases.values()]
    configurations = {
        name: entry.model_copy(update={"median_shape": _median_shape(entry, shapes, spacings)})
        for name, entry in bundle_plans.configurations.items()
    }
    spacing = _medians(spacings)
    return bundle_plans.model_copy(
        update={
            "dataset": spec.name,
            "original_median_spacing": spacing,
            "original_median_shape": _medians(shapes),
            "configurations": configurations,
            "asked_gpu_memory_gb": None,
            "asked_target_spacing": None,
            "left_right": find_left_right(spec, axes),
            "why": (
                f"Axis order, voxel size, patch, batch, network and normalisation are those of the "
                f"plans {bundle_plans.name!r} of {bundle_plans.dataset!r}, so that the weights of "
                "models trained with them fit.",
                *_warnings(bundle_plans, spacing, fingerprint.channels, spec),
                *explain_left_right(spec),
            ),
        }
    )


def _median_shape(
    entry: Configuration, shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Return the median shape at the model's voxel size; slices are not resampled across."""
    first = 3 - entry.num_dimensions
    resampled = [
        new_shape(tuple(shape[first:]), tuple(spacing[first:]), entry.spacing)
        for shape, spacing in zip(shapes, spacings, strict=True)
    ]
    return tuple(float(median(column)) for column in zip(*resampled, strict=True))


def _medians(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(median(column)) for column in zip(*rows, strict=True))


def _warnings(
    plans: Plans,
    spacing: Sequence[float],
    intensity: Sequence[IntensityStatistics],
    spec: DatasetSpec,
) -> Iterator[str]:
    """Yield in words where the data set is unlike the model's."""
    for name, entry in plans.configurations.items():
        own = spacing[3 - entry.num_dimensions :]
        factors = [max(a / b, b / a) for a, b in zip(own, entry.spacing, strict=True)]
        if max(factors) > FAR_SPACING:
            shown = " x ".join(f"{v:.3g}" for v in own)
            wanted = " x ".join(f"{v:.3g}" for v in entry.spacing)
            yield (
                f"{name}: look at it, for the data set's voxels ({shown} mm) differ by more than "
                f"a factor of {FAR_SPACING:g} from the model's ({wanted} mm)."
            )
    schemes = next(iter(plans.configurations.values())).normalization
    for channel, scheme, own_values, model in zip(
        spec.channels, schemes, intensity, plans.intensity, strict=True
    ):
        is_fixed = scheme in ("ct", "quantitative")
        if is_fixed and abs(own_values.mean - model.mean) > FAR_MEAN * model.std:
            yield (
                f"Channel {channel!r}: look at it, for its foreground has the mean "
                f"{own_values.mean:.4g}, the model's had {model.mean:.4g} with a standard "
                f"deviation of {model.std:.4g}."
            )


def _check(
    plans: Plans,
    fingerprint: Fingerprint,
    spec: DatasetSpec,
    bundle_channels: Sequence[str] | None,
) -> None:
    problems = []
    if not fingerprint.cases:
        problems.append("the fingerprint holds no case; run it again")
    if len(plans.intensity) != len(spec.channels):
        problems.append(
            f"the model takes {len(plans.intensity)} channels, the data set has "
            f"{len(spec.channels)} ({', '.join(spec.channels)})"
        )
    elif bundle_channels is not None and _are_in_another_order(bundle_channels, spec.channels):
        problems.append(
            f"the model takes the channels in the order {', '.join(bundle_channels)}, the data "
            f"set has them in the order {', '.join(spec.channels)}"
        )
    flat = [case_id for case_id, case in fingerprint.cases.items() if 1 in case.shape_cropped]
    volumes = [name for name, entry in plans.configurations.items() if entry.num_dimensions == 3]
    if volumes and len(flat) == len(fingerprint.cases) > 0:
        problems.append(
            f"the model is for volumes ({', '.join(volumes)}), every case is a single slice"
        )
    if problems:
        raise PlanError(
            "\n".join(
                [f"the plans of the model cannot be used for {spec.name!r}:"]
                + [f"  {problem}" for problem in problems]
                + ["Choose another model, or plan without --from."]
            )
        )


def _are_in_another_order(first: Sequence[str], second: Sequence[str]) -> bool:
    names = [name.casefold() for name in first], [name.casefold() for name in second]
    return names[0] != names[1] and sorted(names[0]) == sorted(names[1])
