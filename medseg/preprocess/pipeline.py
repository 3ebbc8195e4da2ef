"""From a raw case to the network frame: orient, crop, normalise, resample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.crop import bounding_box, crop, nonzero_mask
from medseg.geometry import Grid, SpatialRecord, orient
from medseg.preprocess.normalize import normalize, normalize_literal
from medseg.resample import (
    new_shape,
    resize,
    resize_labels,
    resize_labels_literal,
    resize_literal,
    separate_axis,
)
from medseg.schema.bundle import MEDSEG, Orientation, Resampling, Semantics
from medseg.schema.plans import Configuration, Plans

Segmentation = NDArray[np.unsignedinteger[Any]]


STEP_VERSION = 4
"""Raise when preprocessing gives other numbers, so that old entries are not taken for new ones."""


def parameters(plans: Plans, configuration: Configuration) -> dict[str, Any]:
    """Return everything besides the files that a preprocessed case depends on, as JSON values."""
    uses_statistics = {"ct", "ct_case", "quantitative"} & set(configuration.normalization)
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


def preprocess_case(  # noqa: PLR0913 - all but the image by keyword
    channels: NDArray[np.float32],
    affine: NDArray[np.float64],
    *,
    plans: Plans,
    configuration: Configuration,
    segmentation: Segmentation | None = None,
    semantics: Semantics = MEDSEG,
    orientation: Orientation = "canonical",
    spacing: Sequence[float] | None = None,
    is_exact: bool = False,
) -> Prepared:
    """Bring a case into the network frame.

    Args:
        channels: (C, I, J, K) intensities on the image's own grid.
        affine: (4, 4) voxel to RAS+ mm.
        plans: Axis order and intensity statistics.
        configuration: Spacing and normalisation.
        segmentation: (I, J, K) label map: in training, or of the stage before. What it marks counts
            as imaged.
        semantics: Order of the steps, and how each resamples.
        orientation: Frame the image is brought to.
        spacing: Voxel size in mm along I, J, K as the file says it; None: by the affine.
        is_exact: Whether to compute as the references do, operation by operation; slow.

    Source:
        Default preprocessors of nnU-Net v2: crop to non-zero, normalise, then resample; and of v1:
        resample, then normalise.
    """
    grid = Grid(shape=channels.shape[1:], affine=affine)
    record = _full_record(
        grid, spacing or grid.spacing, plans, configuration, semantics, orientation
    )
    oriented = record.to_network_axes(_laid_out(channels) if is_exact else channels)
    mask = nonzero_mask(oriented)
    record = _cropped_record(record, bounding_box(mask), semantics)
    inside, labels = crop(mask, record.box), None
    if segmentation is not None:
        labels = np.ascontiguousarray(crop(record.to_network_axes(segmentation), record.box))
        inside = inside | (labels > 0)
    steps = _Steps(plans, configuration, semantics, record, is_exact=is_exact)
    image = crop(oriented, record.box)
    if semantics.normalise_first:
        image = steps.resize(steps.normalize(image, inside))
    else:
        _, blank = steps.resize_labels(np.zeros(inside.shape, np.uint8), ~inside)
        image = steps.normalize(steps.resize(image), ~blank)
    outside = None
    if labels is not None:
        labels, outside = steps.resize_labels(labels, ~inside)
    return Prepared(
        image=image,
        segmentation=labels,
        outside=outside if any(configuration.use_mask_for_norm) else None,
        record=record,
    )


def resize_label_map(
    labels: Segmentation,
    record: SpatialRecord,
    semantics: Semantics,
    *,
    is_exact: bool = False,
    separate: int | None = None,
    otherwise: int = 0,
) -> Segmentation:
    """Bring a label map to the shape of the network frame.

    What a stage before found is worth the references' arithmetic: a label that is decided by the
    rounding of a tie is an input of the network, and one voxel changes many.

    Args:
        labels: (*spatial) unsigned integers, in network order.
        record: Tells the shape.
        semantics: How label maps are resampled.
        is_exact: Whether to compute as the references do.
        separate: Axis along which the nearest slice is taken.
        otherwise: Label where the rule `threshold` finds none.
    """
    how, shape = semantics.resample_labels, record.shape_network
    if how.method == "none":
        if labels.shape != shape:
            raise ValueError(f"labels of shape {labels.shape} are not resampled to {shape}")
        return labels
    order = 1 if how.method == "interpolate" else how.order
    if order == 3:
        raise ValueError("label maps are resampled with order 0 or 1, got 3")
    rule = semantics.label_resize
    if is_exact:
        return resize_labels_literal(
            labels, shape, order=order, separate=separate, method=how.method, rule=rule,
            otherwise=otherwise,
        )  # fmt: skip
    return resize_labels(
        labels, shape, separate=separate, order=order, rule=rule, otherwise=otherwise
    )


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of one case; which of them comes first is for others to say."""

    plans: Plans
    configuration: Configuration
    semantics: Semantics
    record: SpatialRecord
    _: KW_ONLY
    is_exact: bool

    def normalize(
        self, image: NDArray[np.float32], inside: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Return (C, *spatial) normalised intensities."""
        function = normalize_literal if self.is_exact else normalize
        return function(
            image,
            inside,
            schemes=self.configuration.normalization,
            use_mask=self.configuration.use_mask_for_norm,
            intensity=self.plans.intensity,
            least_std=self.semantics.least_std,
            blanks_outside=not self.semantics.normalise_first,
        )

    def resize(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the image (C, *shape_network)."""
        how, shape = self.semantics.resample_image, self.record.shape_network
        separate = self.separate(how)
        order = 1 if how.method == "interpolate" else how.order
        if self.is_exact or order == 0 or how.method == "none":
            return resize_literal(
                image, shape, order=how.order, separate=separate, method=how.method
            )
        return resize(image, shape, order=order, separate=separate)

    def resize_labels(
        self, labels: Segmentation, outside: NDArray[np.bool_]
    ) -> tuple[Segmentation, NDArray[np.bool_]]:
        """Resample labels with the outside taking part as one more, the lowest label."""
        merged = labels.astype(np.min_scalar_type(int(labels.max(initial=0)) + 1))
        merged += 1
        merged[outside] = 0
        is_exact = self.is_exact or self.semantics.previous != "logits"
        resized = resize_label_map(
            merged, self.record, self.semantics, is_exact=is_exact,
            separate=self.separate(self.semantics.resample_labels), otherwise=1,
        )  # fmt: skip
        is_outside = resized == 0
        found = np.where(is_outside, 0, resized - 1).astype(labels.dtype)
        return found, is_outside

    def separate(self, how: Resampling) -> int | None:
        """Return the axis that is resampled on its own."""
        record = self.record
        return separate_axis(record.spacing_cropped, record.spacing_network, when=how.separate)


def _laid_out(channels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy whose memory runs over K slowest, as the references read images."""
    return np.array(channels.transpose(0, 3, 2, 1), dtype=np.float32, order="C").transpose(
        0, 3, 2, 1
    )


def _full_record(
    grid: Grid,
    spacing_image: Sequence[float],
    plans: Plans,
    configuration: Configuration,
    semantics: Semantics,
    orientation: Orientation,
) -> SpatialRecord:
    """Return the record of the un-cropped, un-resampled image."""
    is_stored = orientation == "stored_sitk"
    axes, flips = orient(grid.affine, plans.network_axes, is_stored=is_stored)
    spacing = tuple(spacing_image[axis] for axis in axes)
    oriented = tuple(grid.shape[axis] for axis in axes)
    return SpatialRecord(
        shape_image=grid.shape,
        affine_image=tuple(tuple(float(value) for value in row) for row in grid.affine),
        axes=axes,
        flips=flips,
        box=tuple((0, length) for length in oriented),
        spacing_cropped=spacing,
        shape_network=oriented,
        spacing_network=network_spacing(spacing, configuration, semantics),
    )


def network_spacing(
    spacing: Sequence[float], configuration: Configuration, semantics: Semantics
) -> tuple[float, ...]:
    """Return the voxel size the network sees, of an image of some voxel size in network order."""
    if semantics.resample_image.method == "none":
        return tuple(spacing)
    first = spacing[:1] if semantics.keeps_slices else spacing[: 3 - len(configuration.spacing)]
    return (*first, *configuration.spacing[len(first) + len(configuration.spacing) - 3 :])


def _cropped_record(
    record: SpatialRecord, box: tuple[tuple[int, int], ...], semantics: Semantics
) -> SpatialRecord:
    """Return the record with its box and the network shape that follows from it."""
    shape = tuple(stop - start for start, stop in box)
    network = shape
    if semantics.resample_image.method != "none":
        network = new_shape(shape, record.spacing_cropped, record.spacing_network)
    return replace(record, box=box, shape_network=network)
