"""Random fields."""

import numpy as np
import pytest
from scipy.interpolate import BSpline

from medseg.mr.fields import _bspline_matrix, smooth_field, wave_field


def test_spline_basis_equals_scipy():
    """Every column is one cubic B-spline of the given width; every row adds up to one."""
    matrix = _bspline_matrix(23, 4.5)
    assert matrix.sum(axis=1) == pytest.approx(np.ones(23), abs=1e-6)
    for point in range(matrix.shape[1]):
        basis = BSpline.basis_element(np.arange(-2, 3) + point - 1, extrapolate=False)
        expected = np.nan_to_num(basis(np.arange(23) / 4.5))
        assert matrix[:, point] == pytest.approx(expected, abs=1e-6)


def test_smooth_field_is_smooth_and_of_unit_size():
    """Over many draws a voxel's variance is about one; neighbours hardly differ."""
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_field(rng, (17, 24, 9), step=6.0) for _ in range(200)])
    assert fields.shape == (200, 17, 24, 9)
    assert fields.dtype == np.float32
    assert float(fields.std()) == pytest.approx(1, abs=0.1)
    assert float(np.abs(np.diff(fields, axis=2)).mean()) < 0.25


def test_wave_field_equals_a_sum_of_cosines():
    """The separable product is the sum of plane waves written out, drawn in the same order."""
    shape, wavelength, num_waves = (7, 11, 5), 6.0, 9
    found = wave_field(np.random.default_rng(3), shape, wavelength=wavelength, num_waves=num_waves)
    rng = np.random.default_rng(3)
    directions = rng.standard_normal((num_waves, 3))
    phases = rng.uniform(0, 2 * np.pi, num_waves)
    grid = np.indices(shape).astype(float)
    expected = np.zeros(shape)
    for direction, phase in zip(directions, phases, strict=True):
        unit = direction / np.linalg.norm(direction)
        along = np.tensordot(unit, grid, axes=1)
        expected += np.cos(2 * np.pi * along / wavelength + phase)
    assert found == pytest.approx(expected * np.sqrt(2 / num_waves), abs=1e-4)
