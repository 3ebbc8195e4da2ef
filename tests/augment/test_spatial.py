from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from medseg.augment.spatial import (
    Deformation,
    SpatialSettings,
    draw_deformation,
    elastic_field,
    largest_margin,
    margin,
    patch_offsets,
    rotation_matrix,
    source_positions,
)
from medseg.augment.streams import stream

CPU = torch.device("cpu")
DEFAULT = SpatialSettings(
    patch_size=(10, 16, 12),
    rotation_probability=0.2,
    rotation_max=math.radians(30),
    scaling_probability=0.2,
    scaling_range=(0.7, 1.4),
    elastic_probability=0.0,
)
ALWAYS = dataclasses.replace(
    DEFAULT, rotation_probability=1.0, scaling_probability=1.0, elastic_probability=1.0
)


def test_rotation_is_about_axis_0_first_then_1_then_2():
    angles = (0.4, -0.3, 0.7)
    expected = Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(rotation_matrix(angles), expected, atol=1e-12)


def test_rotation_in_a_plane_turns_axis_0_towards_axis_1():
    np.testing.assert_allclose(rotation_matrix([0.5]) @ [1, 0], [math.cos(0.5), math.sin(0.5)])


def test_shares_of_rotation_and_zoom_are_the_probabilities():
    draws = [draw_deformation(DEFAULT, stream(seed)) for seed in range(3000)]
    matrices = np.array([np.eye(3) if d is None else d.matrix for d in draws])
    factors = np.cbrt(np.linalg.det(matrices))
    is_scaled = np.abs(factors - 1) > 1e-9
    is_rotated = np.abs(matrices / factors[:, None, None] - np.eye(3)).max((1, 2)) > 1e-9
    deviation = 4 * math.sqrt(0.2 * 0.8 / 3000)
    assert abs(is_scaled.mean() - 0.2) < deviation
    assert abs(is_rotated.mean() - 0.2) < deviation
    assert abs((is_scaled & is_rotated).mean() - 0.04) < deviation
    assert np.mean([d is None for d in draws]) == np.mean(~is_scaled & ~is_rotated)


def test_zoom_factor_and_angles_are_uniform():
    draws = [draw_deformation(ALWAYS, stream(seed)) for seed in range(1000)]
    matrices = np.array([d.matrix for d in draws if d is not None])
    factors = np.cbrt(np.linalg.det(matrices))
    assert kstest(factors, "uniform", args=(0.7, 0.7)).pvalue > 0.01
    angles = Rotation.from_matrix(matrices / factors[:, None, None]).as_euler("xyz", degrees=True)
    for axis in range(3):
        assert kstest(angles[:, axis], "uniform", args=(-30, 60)).pvalue > 0.01


def test_one_probability_does_not_change_what_else_is_drawn():
    more = dataclasses.replace(DEFAULT, rotation_probability=0.9)
    for seed in range(200):
        before, after = (draw_deformation(s, stream(seed)) for s in (DEFAULT, more))
        if before is not None:
            assert after is not None
            factors = [np.linalg.det(d.matrix) for d in (before, after)]
            assert factors[0] == pytest.approx(factors[1])


def _corners_in_source(deformation, patch_size, source_size):
    half = [(n - 1) / 2 for n in patch_size]
    push = deformation.elastic_magnitude or (0.0,) * len(half)
    signs = itertools.product((-1, 1), repeat=len(half))
    offsets = np.array(
        [[s * (h + m) for s, h, m in zip(sign, half, push, strict=True)] for sign in signs]
    )
    return offsets @ np.array(deformation.matrix).T + (np.array(source_size) - 1) / 2


@pytest.mark.parametrize(
    ("patch_size", "max_deg"), [((10, 16, 12), 30), ((9, 30, 7), 70), ((11, 18), 15), ((8, 9), 180)]
)
def test_no_deformation_reads_beyond_its_margin_nor_beyond_the_largest(patch_size, max_deg):
    settings = dataclasses.replace(
        ALWAYS, patch_size=patch_size, rotation_max=math.radians(max_deg)
    )
    largest = largest_margin(settings)
    for seed in range(300):
        deformation = draw_deformation(settings, stream(seed))
        own = margin(deformation, patch_size)
        assert all(m <= limit for m, limit in zip(own, largest, strict=True))
        source = [n + 2 * m for n, m in zip(patch_size, own, strict=True)]
        corners = _corners_in_source(deformation, patch_size, source)
        assert corners.min() > -1e-5
        assert (corners.max(0) < np.array(source) - 1 + 1e-5).all()


def test_largest_margin_is_tight_for_a_square_turned_by_45_degrees():
    settings = dataclasses.replace(
        DEFAULT, patch_size=(101, 101), rotation_max=math.pi, scaling_probability=0.0
    )
    assert largest_margin(settings) == (math.ceil(50 * math.sqrt(2) - 50),) * 2


def test_nothing_is_read_beyond_the_patch_if_nothing_can_happen():
    never = dataclasses.replace(DEFAULT, rotation_probability=0.0, scaling_probability=0.0)
    assert largest_margin(never) == (0, 0, 0)
    assert draw_deformation(never, stream(0)) is None


def test_positions_are_the_matrix_applied_to_offsets_from_the_centre():
    matrix = np.array([[1.1, 0.2, 0.0], [-0.2, 0.9, 0.1], [0.05, 0.0, 1.2]])
    patch_size, source_size = (3, 4, 2), (9, 11, 8)
    deformation = Deformation(matrix=tuple(map(tuple, matrix.tolist())))
    offsets = patch_offsets(deformation, patch_size, CPU)
    positions = source_positions(deformation.matrix, offsets, source_size).movedim(0, -1)
    for index in np.ndindex(*patch_size):
        offset = np.array(index) - (np.array(patch_size) - 1) / 2
        expected = matrix @ offset + (np.array(source_size) - 1) / 2
        np.testing.assert_allclose(positions[index].numpy(), expected, atol=1e-5)


def test_elastic_field_has_the_drawn_peak_and_no_mean_and_is_smooth():
    patch_size = (24, 40, 32)
    deformation = Deformation(
        matrix=tuple(map(tuple, np.eye(3).tolist())),
        elastic_width=0.15,
        elastic_magnitude=(1.0, 2.0, 0.5),
        field_seed=4,
    )
    field = elastic_field(deformation, patch_size, CPU)
    np.testing.assert_allclose(field.abs().amax((1, 2, 3)).numpy(), (1.0, 2.0, 0.5), rtol=1e-5)
    np.testing.assert_allclose(field.mean((1, 2, 3)).numpy(), 0, atol=1e-5)
    for axis in range(3):
        assert field.diff(dim=axis + 1).abs().amax() < 0.5
    assert torch.equal(field, elastic_field(deformation, patch_size, CPU))
    other = dataclasses.replace(deformation, field_seed=5)
    assert not torch.equal(field, elastic_field(other, patch_size, CPU))
