"""The grid a chain of models works on: the way of an image to it, and of label maps back.

Shape letters: C channels, I J K axes of the image as stored, R A S canonical axes of the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.geometry import Grid, SpatialRecord, canonical_axes, reorient
from medseg.labels import LabelScheme
from medseg.schema.bundle import Chain
from medseg.values import values_at

Values = NDArray[np.integer[Any]]


def record_of(grid: Grid, spacing: Sequence[float] | None) -> SpatialRecord:
    """Return how an image comes to the grid of a chain.

    Args:
        grid: Of the image.
        spacing: Voxel size in mm along the canonical axes; None: that of the image.

    Source:
        Behaviour of TotalSegmentator, whose voxel sizes are 32-bit numbers.
    """
    axes, flips = canonical_axes(grid.affine)
    own = [float(np.float32(grid.spacing[axis])) for axis in axes]
    target = own if spacing is None else [float(size) for size in spacing]
    lengths = [grid.shape[axis] for axis in axes]
    return SpatialRecord(
        shape_image=grid.shape,
        affine_image=tuple(tuple(row) for row in grid.affine.tolist()),
        axes=axes,
        flips=flips,
        box=tuple((0, length) for length in lengths),
        spacing_cropped=tuple(own),
        shape_network=tuple(
            max(1, round(length * (size / wanted)))
            for length, size, wanted in zip(lengths, own, target, strict=True)
        ),
        spacing_network=tuple(target),
    )


def grid_of(record: SpatialRecord, spacing: Sequence[float] | None) -> Grid:
    """Return the grid of a chain's image: its first voxel lies where that of the image does."""
    image = Grid(record.shape_image, np.array(record.affine_image))
    oriented = reorient(image, record.axes, record.flips)
    affine = np.array(oriented.affine)
    if spacing is not None:
        affine[:3, :3] *= np.array(record.spacing_network) / record.spacing_cropped
    a, b, c = record.shape_network
    return Grid((a, b, c), affine)


def to_chain_grid(
    channels: NDArray[np.float32], record: SpatialRecord, chain: Chain
) -> NDArray[np.float32]:
    """Return an image on the grid of a chain.

    Args:
        channels: (C, I, J, K).
        record: See `record_of`.
        chain: Order of the spline, and what becomes of the values.

    Returns:
        (C, *record.shape_network), which shares no memory with the image.

    Source:
        Behaviour of TotalSegmentator.
    """
    from scipy import ndimage  # takes a while to import

    oriented = record.to_network_axes(channels)
    if record.spacing_network == record.spacing_cropped:
        return np.array(oriented, order="C")
    result = np.empty((len(channels), *record.shape_network), dtype=np.float32)
    zoom = [
        after / before
        for after, before in zip(record.shape_network, record.shape_oriented, strict=True)
    ]
    for channel, target in zip(oriented, result, strict=True):
        values = ndimage.zoom(channel, zoom, output=np.float64, order=chain.order, mode="nearest")
        target[...] = np.trunc(values, out=values) if chain.truncate else values
    return result


def merge(
    merged: Values,
    found: Values,
    values: Mapping[int, int],
    labels: LabelScheme,
    background: int,
) -> None:
    """Write what a part found over what the parts before it did.

    Args:
        merged: Label map of the chain, changed in place.
        found: Label map of the part, of the same shape.
        values: Value of the part -> value of the chain; others say nothing.
        labels: Of the part.
        background: Value of the chain's background.
    """
    table = np.array([values.get(value, background) for value in labels.values], merged.dtype)
    own = values_at(table, labels.to_indices(found, "a part of the chain"))
    np.copyto(merged, own, where=own != background)


def to_image(segmentation: Values, record: SpatialRecord) -> Values:
    """Return a label map of a chain's grid on that of the image: the nearest label's.

    Args:
        segmentation: (*record.shape_network).
        record: See `record_of`.

    Returns:
        (I, J, K), of the same type.
    """
    for axis, length in enumerate(record.shape_oriented):
        if length != segmentation.shape[axis]:
            nearest = nearest_places(segmentation.shape[axis], length)
            segmentation = segmentation.take(nearest, axis=axis)
    result: Values = np.ascontiguousarray(record.to_image_axes(segmentation))
    return result


def nearest_places(before: int, after: int) -> NDArray[np.int64]:
    """Return, for each of `after` voxels, the nearest of `before`, first on first, last on last.

    Examples:
        >>> nearest_places(3, 5).tolist()
        [0, 1, 1, 2, 2]
    """
    from scipy import ndimage

    places: NDArray[np.int64] = ndimage.zoom(
        np.arange(before), after / before, order=0, mode="nearest"
    )
    return places
