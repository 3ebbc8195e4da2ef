"""From logits in the network frame to results on the image's own grid, slab by slab.

Shape letters: L logit channels, n0 n1 n2 network axes, I J K axes of the image as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.geometry import SpatialRecord
from medseg.labels import LabelScheme
from medseg.resample import resize_slab, separate_axis
from medseg.values import value_counts

SLAB_ELEMENTS = 2**24
"""Largest number of logits resampled at once: what export needs beyond its input and output."""


def segmentation_from_logits(
    logits: torch.Tensor, record: SpatialRecord, labels: LabelScheme
) -> NDArray[np.integer[Any]]:
    """Return the label map on the image's own grid, with the values of the dataset's files.

    Logits are resampled linearly to the cropped image, slab by slab, so memory does not grow with
    classes times image size; each voxel takes its label, voxels outside the crop are background.

    Args:
        logits: (L, *record.shape_network), float32.
        record: The way back to the image's grid.
        labels: What the L channels mean.

    Returns:
        (I, J, K) array of the smallest type that holds the dataset's values.
    """
    segmentation: NDArray[np.integer[Any]]
    segmentation = np.full(record.shape_image, labels.background, dtype=labels.value_dtype)
    box = record.to_network_axes(segmentation)[_box(record)]
    for rows, slab in _cropped_slabs(logits, record):
        box[rows] = labels.to_values(labels.segment(slab))
    return segmentation


def probabilities_from_logits(
    logits: torch.Tensor, record: SpatialRecord, labels: LabelScheme
) -> NDArray[np.float32]:
    """Return probabilities on the image's own grid.

    Outside the crop the background has probability 1; with regions every region has 0 there.

    Args:
        logits: (L, *record.shape_network), float32.
        record: The way back to the image's grid.
        labels: What the L channels mean.

    Returns:
        (L, I, J, K) float32 array.
    """
    probabilities = np.zeros((labels.num_logits, *record.shape_image), dtype=np.float32)
    if not labels.has_regions:
        probabilities[0] = 1
    box = record.to_network_axes(probabilities)[(slice(None), *_box(record))]
    for rows, slab in _cropped_slabs(logits, record):
        box[:, rows] = labels.activate(slab).numpy()
    return probabilities


def indices_for_next_stage(
    logits: torch.Tensor, record: SpatialRecord, target: SpatialRecord, labels: LabelScheme
) -> NDArray[np.unsignedinteger[Any]]:
    """Return what the first stage of a cascade found, on the grid of the second stage's network.

    Logits are resampled linearly, slab by slab, before each voxel takes its label.

    Args:
        logits: (L, *record.shape_network) of the first stage, float32.
        record: How the first stage's network saw the image.
        target: How the second stage's network sees the same image.
        labels: What the L channels mean.

    Returns:
        (*target.shape_network) label indices.

    Raises:
        ValueError: If the two records are not of one image, cropped alike.

    Source:
        Behaviour of nnU-Net v2, which writes such label maps for the training of a second stage;
        here it is the way in prediction too.
    """
    for name in ("shape_image", "axes", "flips", "box"):
        if getattr(record, name) != getattr(target, name):
            raise ValueError(
                f"{name} is {getattr(record, name)} in the first stage and "
                f"{getattr(target, name)} in the second; expected one image, cropped alike"
            )
    found: NDArray[np.unsignedinteger[Any]]
    found = np.empty(target.shape_network, dtype=labels.index_dtype)
    for rows, slab in _slabs(logits, record, target.shape_network, target.spacing_network):
        found[rows] = labels.segment(slab)
    return found


def volumes_ml(
    segmentation: NDArray[np.integer[Any]],
    affine: NDArray[np.float64],
    labels: LabelScheme,
) -> dict[str, float]:
    """Return the volume of every structure in millilitres; a region is the sum of its labels.

    Args:
        segmentation: (I, J, K) label map with the values of files.
        affine: (4, 4) voxel to mm.
        labels: Structures and their label values.
    """
    values, numbers = value_counts(segmentation)
    counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000
    return {
        name: float(sum(counts.get(value, 0) for value in set(values))) * voxel_ml
        for name, values in labels.structures.items()
    }


def _box(record: SpatialRecord) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in record.box)


def _cropped_slabs(
    logits: torch.Tensor, record: SpatialRecord
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows along network axis 0, logits (L, rows, n1, n2)) of the cropped image."""
    return _slabs(logits, record, record.shape_cropped, record.spacing_cropped)


def _slabs(
    logits: torch.Tensor, record: SpatialRecord, shape: Sequence[int], spacing: Sequence[float]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows along network axis 0, logits (L, rows, n1, n2)) on another grid of the box.

    The separate axis is decided from the network's spacing and the one asked for: a 2D
    configuration keeps the length of its slice axis, so slices never mix.
    """
    shape = tuple(shape)
    if tuple(logits.shape[1:]) != tuple(record.shape_network):
        raise ValueError(
            f"logits have the shape {tuple(logits.shape[1:])}, the record says "
            f"{tuple(record.shape_network)}"
        )
    separate = separate_axis(record.spacing_network, spacing)
    thickness = max(1, SLAB_ELEMENTS // (logits.shape[0] * math.prod(shape[1:])))
    for start in range(0, shape[0], thickness):
        stop = min(start + thickness, shape[0])
        if shape == tuple(record.shape_network):
            yield slice(start, stop), logits[:, start:stop]
        else:
            yield slice(start, stop), resize_slab(logits, shape, 0, start, stop, separate=separate)
