"""Rotation, zoom and elastic deformation of one patch: its parameters and where it reads.

Positions are voxel indices of the source array; the centre of the patch lies on the centre of the
source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medseg.augment.streams import between, draw_field_seed, field_generator

ELASTIC_WIDTH = (0.08, 0.15)
"""Gaussian width of an elastic field, as a fraction of each patch edge."""
ELASTIC_MAGNITUDE = (0.0, 0.05)
"""Largest elastic displacement along an axis, as a fraction of the patch edge."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpatialSettings:
    """What may happen to a patch, over its two or three deformed axes."""

    patch_size: tuple[int, ...]
    """Voxels along each deformed axis."""
    rotation_probability: float
    """Chance of a rotation."""
    rotation_max: float
    """Largest angle about each axis, radians."""
    scaling_probability: float
    """Chance of a zoom."""
    scaling_range: tuple[float, float]
    """Factors; above 1 the patch covers more of the source and objects appear smaller."""
    elastic_probability: float
    """Chance of an elastic deformation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deformation:
    """What happens to one patch."""

    matrix: Matrix
    """Offset from the patch's centre -> offset from the source's centre, voxels."""
    elastic_width: float = 0.0
    """Gaussian width of the elastic field, as a fraction of each patch edge."""
    elastic_magnitude: tuple[float, ...] = ()
    """Largest elastic displacement along each axis, voxels; empty without an elastic field."""
    field_seed: int = 0
    """Seed of the elastic field."""


def rotation_matrix(angles: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the rotation by `angles` (radians): one angle in a plane, three about axes 0, 1, 2.

    A positive angle about axis 0 turns axis 1 towards axis 2, and so on cyclically; axis 0 comes
    first. In a plane it turns axis 0 towards axis 1.

    Examples:
        >>> rotation_matrix([math.pi / 2]).round().astype(int).tolist()
        [[0, -1], [1, 0]]
    """
    if len(angles) == 1:
        return _turn(2, 0, 1, angles[0])
    first, second, third = (
        _turn(3, (axis + 1) % 3, (axis + 2) % 3, angle) for axis, angle in enumerate(angles)
    )
    return third @ second @ first


def _turn(size: int, origin: int, towards: int, angle: float) -> npt.NDArray[np.float64]:
    matrix = np.eye(size)
    matrix[origin, origin] = matrix[towards, towards] = math.cos(angle)
    matrix[towards, origin] = math.sin(angle)
    matrix[origin, towards] = -math.sin(angle)
    return matrix


def draw_deformation(settings: SpatialSettings, rng: np.random.Generator) -> Deformation | None:
    """Draw one patch's deformation; None where nothing happens.

    All numbers are drawn whether they are used or not, so that one probability does not change
    the draws of the others.
    """
    num_axes = len(settings.patch_size)
    num_angles = 3 if num_axes == 3 else 1
    rotates, scales, deforms = (
        rng.random(3)
        < (
            settings.rotation_probability,
            settings.scaling_probability,
            settings.elastic_probability,
        )
    ).tolist()
    limits = (-settings.rotation_max, settings.rotation_max)
    angles = [between(value, limits) for value in rng.random(num_angles).tolist()]
    factor = between(rng.random(), settings.scaling_range)
    width = between(rng.random(), ELASTIC_WIDTH)
    strengths = [between(value, ELASTIC_MAGNITUDE) for value in rng.random(num_axes).tolist()]
    field_seed = draw_field_seed(rng)
    if not (rotates or scales or deforms):
        return None
    matrix = rotation_matrix(angles if rotates else [0.0] * num_angles) * (factor if scales else 1)
    magnitude = tuple(s * n for s, n in zip(strengths, settings.patch_size, strict=True))
    return Deformation(
        matrix=tuple(tuple(row) for row in matrix.tolist()),
        elastic_width=width if deforms else 0.0,
        elastic_magnitude=magnitude if deforms else (),
        field_seed=field_seed,
    )


def margin(deformation: Deformation, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the voxels beyond the patch, on each side of each axis, that a deformation reads."""
    half = _half_extent(patch_size, deformation.elastic_magnitude or (0.0,) * len(patch_size))
    return _beyond(np.abs(np.asarray(deformation.matrix)) @ half, patch_size)


def largest_margin(settings: SpatialSettings) -> tuple[int, ...]:
    """Return the `margin` that suffices for every deformation that can be drawn."""
    size = settings.patch_size
    strength = ELASTIC_MAGNITUDE[1] if settings.elastic_probability > 0 else 0.0
    half = _half_extent(size, [strength * n for n in size])
    angle = settings.rotation_max if settings.rotation_probability > 0 else 0.0
    factor = max(1.0, settings.scaling_range[1]) if settings.scaling_probability > 0 else 1.0
    return _beyond(_largest_reach(half, abs(angle)) * factor, size)


def _half_extent(size: Sequence[int], magnitude: Sequence[float]) -> npt.NDArray[np.float64]:
    extents = [(n - 1) / 2 + more for n, more in zip(size, magnitude, strict=True)]
    return np.array(extents, dtype=np.float64)


def _beyond(reach: npt.NDArray[np.float64], size: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        max(0, math.ceil(r - (n - 1) / 2 - 1e-6)) for r, n in zip(reach, size, strict=True)
    )


def _largest_reach(half: npt.NDArray[np.float64], angle: float) -> npt.NDArray[np.float64]:
    """Return the largest half extent along each axis of a rotated box, over all angles.

    A fine grid of angles, plus a tenth of a voxel for what lies between its points; from a
    quarter turn on, the box's half diagonal.
    """
    if angle == 0:
        return half
    if angle >= math.pi / 2:
        return np.full(len(half), np.linalg.norm(half))
    steps = np.linspace(-angle, angle, 41)
    c, s = np.cos(steps), np.sin(steps)
    turns = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    if len(half) == 2:
        return np.asarray((np.abs(turns) @ half).max(0) + 0.1)
    first, second, third = (_embed(turns, axis) for axis in range(3))
    matrices = third[:, None, None] @ second[:, None] @ first
    return np.asarray((np.abs(matrices) @ half).max((0, 1, 2)) + 0.1)


def _embed(turns: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """Place plane rotations (T, 2, 2) into rotations (T, 3, 3) about `axis`."""
    matrices = np.tile(np.eye(3), (len(turns), 1, 1))
    plane = [(axis + 1) % 3, (axis + 2) % 3]
    matrices[:, np.array(plane)[:, None], plane] = turns
    return matrices


def patch_offsets(
    deformation: Deformation, patch_size: Sequence[int], device: torch.device
) -> tuple[Tensor, ...]:
    """Return each patch voxel's offset from the centre, elastic displacement included.

    Nothing but kernel arguments passes from the host to the device, so nothing waits for it.

    Returns:
        One tensor for each axis that broadcasts to (*patch), in voxels.
    """
    num_axes = len(patch_size)
    offsets = tuple(
        (torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2).reshape(
            [-1 if axis == other else 1 for other in range(num_axes)]
        )
        for axis, size in enumerate(patch_size)
    )
    if not deformation.elastic_magnitude:
        return offsets
    field = elastic_field(deformation, patch_size, device)
    return tuple(offset + shift for offset, shift in zip(offsets, field, strict=True))


def source_positions(
    matrix: Matrix, offsets: Sequence[Tensor], source_size: Sequence[int]
) -> Tensor:
    """Return where each patch voxel reads the source, (axes, *patch) in voxels."""
    shape = np.broadcast_shapes(*(tuple(offset.shape) for offset in offsets))
    positions = offsets[0].new_empty((len(source_size), *shape))
    for row, size, position in zip(matrix, source_size, positions, strict=True):
        partial = offsets[0] * row[0] + (size - 1) / 2
        for weight, offset in zip(row[1:-1], offsets[1:-1], strict=True):
            partial = partial + offset * weight
        torch.add(partial, offsets[-1] * row[-1], out=position).clamp_(0, size - 1)
    return positions


def elastic_field(
    deformation: Deformation, patch_size: Sequence[int], device: torch.device
) -> Tensor:
    """Return smooth displacements (axes, *patch) in voxels, zero on average.

    Along each axis the largest absolute displacement is the deformation's magnitude.
    """
    generator = field_generator(deformation.field_seed, device)
    shape = (len(patch_size), *patch_size)
    field = torch.empty(shape, device=device).normal_(generator=generator)
    for axis, size in enumerate(patch_size):
        index = torch.arange(size, device=device, dtype=torch.float32)
        distance = (index[:, None] - index) / max(deformation.elastic_width * size, 1e-3)
        smooth = torch.softmax(-0.5 * distance.square(), dim=1)
        field = (field.movedim(axis + 1, -1) @ smooth.T).movedim(-1, axis + 1)
    spatial = tuple(range(1, field.ndim))
    field = field - field.mean(spatial, keepdim=True)
    peak = field.abs().amax(spatial, keepdim=True).clamp(min=1e-12)
    return torch.stack(
        [
            one * (magnitude / top)
            for one, top, magnitude in zip(field, peak, deformation.elastic_magnitude, strict=True)
        ]
    )
