"""The three planes through an image, as a radiologist sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.unsignedinteger[Any]]
Voxel = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One plane through an image on canonical (right, anterior, superior) axes.

    Attributes:
        name: What a radiologist calls it.
        normal: Axis the plane cuts.
        across: Axis whose direction points to the left of the picture.
        up: Axis whose direction points to the top, a later one than `across`.
        letters: Patient directions at left, right, top and bottom of the picture.
    """

    name: str
    normal: int
    across: int
    up: int
    letters: tuple[str, str, str, str]

    def cut(self, array: NDArray[Any], voxel: Voxel) -> NDArray[Any]:
        """Return the (up, across) picture through a voxel; row 0 is the bottom.

        Args:
            array: (I, J, K), or (I, J, K, C) of colours that the picture keeps as its last axis.
            voxel: What the plane goes through.
        """
        picture: NDArray[Any] = array[(slice(None),) * self.normal + (voxel[self.normal],)]
        return np.flip(picture.swapaxes(0, 1), axis=1)

    def steps(self, spacing: tuple[float, float, float]) -> tuple[float, float]:
        """Return the size of a pixel (across, up) in mm."""
        return spacing[self.across], spacing[self.up]


PLANES = (
    Plane(name="axial", normal=2, across=0, up=1, letters=("R", "L", "A", "P")),
    Plane(name="coronal", normal=1, across=0, up=2, letters=("R", "L", "S", "I")),
    Plane(name="sagittal", normal=0, across=1, up=2, letters=("A", "P", "S", "I")),
)
"""Radiological convention: the patient's right is at the left, the nose points left."""


def centre_of_largest(labels: Labels) -> Voxel:
    """Return a voxel whose three planes show the largest structure well.

    Of each axis it is the slice closest to the centre of mass among those in which the structure
    has at least half of its largest area: between two lungs there is nothing to see.

    Args:
        labels: Label map, shape (I, J, K); without any structure the middle voxel is returned.
    """
    counts = np.bincount(labels.reshape(-1))
    counts[:1] = 0
    if not counts.any():
        i, j, k = (length // 2 for length in labels.shape)
        return i, j, k
    mask = labels == int(counts.argmax())
    i, j, k = (_middle_slice(mask.sum(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    return i, j, k


def _middle_slice(areas: NDArray[np.int64]) -> int:
    """Return the slice of at least half the largest area that is closest to the centre of mass.

    Examples:
        >>> _middle_slice(np.array([0, 9, 9, 1, 0, 8, 8]))
        2
    """
    slices = np.arange(len(areas))
    distances = np.abs(slices - np.average(slices, weights=areas))
    return int(np.where(2 * areas >= areas.max(), distances, np.inf).argmin())
