"""From a raw case to the network frame: orient, crop, normalise, resample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.crop import bounding_box, crop, nonzero_mask
from medseg.geometry import Grid, SpatialRecord, orient
from medseg.preprocess.normalize import normalize
from medseg.resample import new_shape, resize, resize_labels, separate_axis
from medseg.schema.plans import Configuration, Plans

Segmentation = NDArray[np.unsignedinteger[Any]]


STEP_VERSION = 3
"""Raise when preprocessing gives other numbers, so that old entries are not taken for new ones."""


def parameters(plans: Plans, configuration: Configuration) -> dict[str, Any]:
    """Return everything besides the files that a preprocessed case depends on, as JSON values."""
    uses_statistics = {"ct", "quantitative"} & set(configuration.normalization)
    return {
        "version": STEP_VERSION,
        "network_axes": plans.network_axes,
        "spacing": configuration.spacing,
        "normalization": configuration.normalization,
        "use_mask": configuration.use_mask_for_norm,
        "intensity": [c.model_dump() for c in plans.intensity] if uses_statistics else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A case in the network frame."""

    image: NDArray[np.float32]
    """(C, *shape_network) normalised intensities."""
    segmentation: Segmentation | None
    """(*shape_network) label map."""
    outside: NDArray[np.bool_] | None
    """(*shape_network) True outside the imaged region; None where no channel needs it."""
    record: SpatialRecord
    """The way back to the image's own grid."""


def preprocess_case(
    channels: NDArray[np.float32],
    affine: NDArray[np.float64],
    *,
    plans: Plans,
    configuration: Configuration,
    segmentation: Segmentation | None = None,
) -> Prepared:
    """Bring a case into the network frame.

    Args:
        channels: (C, I, J, K) intensities on the image's own grid.
        affine: (4, 4) voxel to RAS+ mm.
        plans: Axis order and intensity statistics.
        configuration: Spacing and normalisation.
        segmentation: (I, J, K) label map, in training.

    Source:
        Default preprocessor of nnU-Net v2: crop to non-zero, normalise, then resample.
    """
    record = _full_record(channels, affine, plans, configuration)
    oriented = record.to_network_axes(channels)
    mask = nonzero_mask(oriented)
    record = _cropped_record(record, bounding_box(mask))
    inside = crop(mask, record.box)
    labels = None
    if segmentation is not None:
        labels = np.ascontiguousarray(crop(record.to_network_axes(segmentation), record.box))
        inside = inside | (labels > 0)
    normalised = normalize(
        crop(oriented, record.box),
        inside,
        schemes=configuration.normalization,
        use_mask=configuration.use_mask_for_norm,
        intensity=plans.intensity,
    )
    separate = separate_axis(record.spacing_cropped, record.spacing_network)
    image = resize(normalised, record.shape_network, order=3, separate=separate)
    outside = None
    if labels is not None:
        labels, outside = _resize_labels(labels, ~inside, record.shape_network, separate)
    return Prepared(
        image=image,
        segmentation=labels,
        outside=outside if any(configuration.use_mask_for_norm) else None,
        record=record,
    )


def _full_record(
    channels: NDArray[np.float32],
    affine: NDArray[np.float64],
    plans: Plans,
    configuration: Configuration,
) -> SpatialRecord:
    """Return the record of the un-cropped, un-resampled image."""
    axes, flips = orient(affine, plans.network_axes)
    shape = channels.shape[1:]
    grid = Grid(shape=(shape[0], shape[1], shape[2]), affine=affine)
    spacing = tuple(grid.spacing[axis] for axis in axes)
    oriented = tuple(shape[axis] for axis in axes)
    return SpatialRecord(
        shape_image=grid.shape,
        affine_image=tuple(tuple(float(value) for value in row) for row in affine),
        axes=axes,
        flips=flips,
        box=tuple((0, length) for length in oriented),
        spacing_cropped=spacing,
        shape_network=oriented,
        spacing_network=(*spacing[: 3 - len(configuration.spacing)], *configuration.spacing),
    )


def _cropped_record(record: SpatialRecord, box: tuple[tuple[int, int], ...]) -> SpatialRecord:
    """Return the record with its box and the network shape that follows from it."""
    shape = tuple(stop - start for start, stop in box)
    network = new_shape(shape, record.spacing_cropped, record.spacing_network)
    return replace(record, box=box, shape_network=network)


def _resize_labels(
    labels: Segmentation,
    outside: NDArray[np.bool_],
    shape: tuple[int, ...],
    separate: int | None,
) -> tuple[Segmentation, NDArray[np.bool_]]:
    """Resample labels with the outside mask taking part as one more label."""
    extra = int(labels.max(initial=0)) + 1
    merged = labels.astype(np.min_scalar_type(extra))
    merged[outside] = extra
    resized = resize_labels(merged, shape, separate=separate)
    outside_resized = resized == extra
    resized[outside_resized] = 0
    return resized.astype(labels.dtype), outside_resized
