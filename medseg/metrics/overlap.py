"""Voxel counts of label maps and the measures that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.values import distinct_values, places_in

SLAB_VOXELS = 2**22
"""Voxels handled at a time; bounds the memory of the joint histogram."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Voxel counts of one structure; a measure whose denominator is zero is None.

    Examples:
        >>> Overlap(true_positives=3, false_positives=1, false_negatives=1, true_negatives=5).dice
        0.75
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def dice(self) -> float | None:
        """Return 2 TP / (2 TP + FP + FN)."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)

    @property
    def iou(self) -> float | None:
        """Return TP / (TP + FP + FN)."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(self.true_positives, self.true_positives + wrong)

    @property
    def precision(self) -> float | None:
        """Return TP / (TP + FP)."""
        return _ratio(self.true_positives, self.num_predicted)

    @property
    def recall(self) -> float | None:
        """Return TP / (TP + FN)."""
        return _ratio(self.true_positives, self.num_reference)

    @property
    def num_predicted(self) -> int:
        """Return the number of voxels of the prediction."""
        return self.true_positives + self.false_positives

    @property
    def num_reference(self) -> int:
        """Return the number of voxels of the reference."""
        return self.true_positives + self.false_negatives


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


@dataclass(frozen=True, slots=True, kw_only=True)
class JointCounts:
    """Joint histogram of two label maps.

    Attributes:
        values: Label values that occur in either map, ascending, shape (L,).
        counts: Voxels by (value of the prediction, value of the reference), shape (L, L).
    """

    values: NDArray[np.integer[Any]]
    counts: NDArray[np.int64]

    def overlap(self, values: Iterable[int]) -> Overlap:
        """Return the counts of the union of some label values."""
        inside = np.isin(self.values, list(values))
        true_positives = int(self.counts[np.ix_(inside, inside)].sum())
        predicted = int(self.counts[inside].sum())
        reference = int(self.counts[:, inside].sum())
        total = int(self.counts.sum())
        return Overlap(
            true_positives=true_positives,
            false_positives=predicted - true_positives,
            false_negatives=reference - true_positives,
            true_negatives=total - predicted - reference + true_positives,
        )


def joint_counts(
    prediction: NDArray[np.integer[Any]],
    reference: NDArray[np.integer[Any]],
    *,
    valid: NDArray[np.bool_] | None = None,
) -> JointCounts:
    """Count the voxels of every pair of label values, in one pass for all structures.

    Args:
        prediction: Label map, any shape.
        reference: Label map of the same shape.
        valid: Voxels to count, same shape; None counts all.

    Raises:
        ValueError: If the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}")
    values = np.union1d(distinct_values(prediction), distinct_values(reference))
    prediction, reference = (_positions(values, each) for each in (prediction, reference))
    counts = np.zeros(len(values) ** 2, dtype=np.int64)
    chosen = None if valid is None else valid.reshape(-1)
    flat_prediction, flat_reference = prediction.reshape(-1), reference.reshape(-1)
    for start in range(0, flat_prediction.size, SLAB_VOXELS):
        slab = slice(start, start + SLAB_VOXELS)
        pairs = flat_prediction[slab].astype(np.intp) * len(values) + flat_reference[slab]
        if chosen is not None:
            pairs = pairs[chosen[slab]]
        counts += np.bincount(pairs, minlength=counts.size)
    return JointCounts(values=values, counts=counts.reshape(len(values), len(values)))


def _positions(
    values: NDArray[np.integer[Any]], segmentation: NDArray[np.integer[Any]]
) -> NDArray[np.integer[Any]]:
    """Return where in an ascending list each value of a label map stands."""
    if np.array_equal(values, np.arange(len(values))):
        return segmentation
    kind = np.min_scalar_type(len(values))
    places: NDArray[np.integer[Any]] = places_in(values.tolist(), segmentation, kind)
    return places


def volume_ml(num_voxels: int, affine: NDArray[np.float64]) -> float:
    """Return the volume of a number of voxels in ml.

    Args:
        num_voxels: Number of voxels.
        affine: Voxel indices to mm, shape (4, 4).

    Examples:
        >>> volume_ml(500, np.diag([2.0, 1.0, 3.0, 1.0]))
        3.0
    """
    return num_voxels * abs(float(np.linalg.det(affine[:3, :3]))) / 1000
