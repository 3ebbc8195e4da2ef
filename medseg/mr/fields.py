"""Smooth random fields on regular lattices."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def smooth_field(rng: np.random.Generator, shape: tuple[int, int, int], *, step: float) -> Array:
    """Return a random field without detail finer than a given length.

    Args:
        rng: Source of randomness.
        shape: Shape of the field in voxels.
        step: Distance of the control points in voxels; the field is a cubic B-spline through
            independent normal coefficients.

    Returns:
        Field of the given shape, about zero mean and unit standard deviation.
    """
    bases = [_bspline_matrix(length, step) for length in shape]
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:
        field = np.tensordot(field, basis, axes=(0, 1))
    return np.asarray(field / math.sqrt(_BSPLINE_POWER**3), np.float32)


_BSPLINE_POWER = 0.479365
"""Integral of the squared cubic B-spline: variance of a field along one axis."""


def _bspline_matrix(length: int, step: float) -> Array:
    """Return (length, control points): the cubic B-spline of each control point at each voxel."""
    num_points = math.ceil((length - 1) / step) + 3
    distance = np.abs(np.arange(length)[:, None] / step - (np.arange(num_points) - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def wave_field(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    *,
    wavelength: float,
    num_waves: int = 48,
) -> Array:
    """Return a random field of one wavelength; its zero level is a labyrinth of even width.

    Args:
        rng: Source of randomness.
        shape: Shape of the field in voxels.
        wavelength: Wavelength in voxels; neighbouring zero sheets lie about half of it apart.
        num_waves: Plane waves that are added up.

    Returns:
        Field of the given shape, about zero mean and unit standard deviation.
    """
    directions = rng.standard_normal((num_waves, 3))
    directions *= 2 * np.pi / wavelength / np.linalg.norm(directions, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, num_waves)
    axes = [
        np.exp(1j * np.outer(directions[:, axis], np.arange(length))).astype(np.complex64)
        for axis, length in enumerate(shape)
    ]
    axes[0] = axes[0] * np.exp(1j * phases).astype(np.complex64)[:, None]
    field = np.einsum("wi,wj,wk->ijk", *axes, optimize=True).real
    return np.asarray(field * math.sqrt(2 / num_waves), np.float32)
