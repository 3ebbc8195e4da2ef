"""Distances between the surfaces of two structures, in mm.

A surface is the set of voxels of a structure with a face neighbour outside it (beyond the image
counts as outside); distances are between voxel centres. A neighbour that takes no part in the
evaluation makes no surface. Axes of length one have no neighbours: a single slice has outlines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceDistances:
    """Distance of every surface voxel to the other surface.

    Attributes:
        to_reference: From the prediction's surface to the reference's, mm; infinite where the
            reference has none. Shape (number of surface voxels of the prediction,).
        to_prediction: From the reference's surface to the prediction's, likewise.
    """

    to_reference: NDArray[np.float64]
    to_prediction: NDArray[np.float64]


def surface(
    mask: NDArray[np.bool_], *, valid: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Return the surface voxels of a structure.

    Args:
        mask: The structure, shape (*spatial).
        valid: Voxels that take part in the evaluation, same shape; None: all.

    Examples:
        >>> surface(np.array([0, 1, 1, 1, 0], bool)).astype(int).tolist()
        [0, 1, 0, 1, 0]
    """
    solid = mask if valid is None else mask | ~valid
    padded = np.pad(solid, [(int(length > 1),) * 2 for length in mask.shape])
    core = tuple(slice(1, -1) if length > 1 else slice(None) for length in mask.shape)
    inner = np.ones(mask.shape, dtype=bool)
    for axis, length in enumerate(mask.shape):
        for side in (slice(0, -2), slice(2, None)):
            if length > 1:
                inner &= padded[(*core[:axis], side, *core[axis + 1 :])]
    taking_part = mask if valid is None else mask & valid
    return taking_part & ~inner


def surface_distances(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    *,
    spacing: tuple[float, ...],
    valid: NDArray[np.bool_] | None = None,
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two structures.

    Args:
        prediction: Predicted structure, shape (*spatial).
        reference: Reference structure, same shape.
        spacing: Voxel size in mm, one entry per axis.
        valid: Voxels that take part in the evaluation, same shape; None: all.
    """
    surfaces = (surface(prediction, valid=valid), surface(reference, valid=valid))
    either = surfaces[0] | surfaces[1]
    if not either.any():
        return SurfaceDistances(to_reference=np.empty(0), to_prediction=np.empty(0))
    # Both the points and what they are measured to lie in this box, so nothing is lost.
    box = ndimage.find_objects(either.astype(np.uint8))[0]
    ours, theirs = surfaces[0][box], surfaces[1][box]
    return SurfaceDistances(
        to_reference=_distances(ours, theirs, spacing),
        to_prediction=_distances(theirs, ours, spacing),
    )


def _distances(
    points: NDArray[np.bool_], target: NDArray[np.bool_], spacing: tuple[float, ...]
) -> NDArray[np.float64]:
    if not target.any():
        return np.full(int(points.sum()), np.inf)
    distances: NDArray[np.float64] = ndimage.distance_transform_edt(~target, sampling=spacing)
    return distances[points]


def hd95_mm(distances: SurfaceDistances) -> float | None:
    """Return the larger of the two directed 95th percentiles in mm, None if a surface is empty."""
    if not distances.to_reference.size or not distances.to_prediction.size:
        return None
    directed = (distances.to_reference, distances.to_prediction)
    return max(float(np.percentile(one, 95)) for one in directed)


def nsd(distances: SurfaceDistances, tolerance_mm: float) -> float | None:
    """Return the share of both surfaces that lies within a tolerance of the other one.

    Args:
        distances: Distances in mm.
        tolerance_mm: Distance still accepted, mm.

    Returns:
        A number from 0 to 1; None if both surfaces are empty.

    Source:
        Normalised surface Dice of Nikolov et al. 2018 (arXiv:1809.04430), over surface voxels.
    """
    total = distances.to_reference.size + distances.to_prediction.size
    if total == 0:
        return None
    # Distances are sums of rounded products: a surface exactly at the tolerance counts as within.
    limit = tolerance_mm * (1 + 1e-9)
    within = sum(
        int((one <= limit).sum()) for one in (distances.to_reference, distances.to_prediction)
    )
    return within / total
