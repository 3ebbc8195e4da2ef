"""Tiles: positions, weights, padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.infer.tiles import importance, num_tiles, padding, tile_indices, tile_starts


@pytest.mark.parametrize(
    ("length", "tile", "step", "expected"),
    [
        (110, 64, 0.5, (0, 23, 46)),
        (64, 64, 0.5, (0,)),
        (65, 64, 0.5, (0, 1)),
        (123, 54, 0.5, (0, 23, 46, 69)),
        (7, 4, 1.0, (0, 3)),
        (30, 8, 0.25, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22)),
        (9, 4, 0.5, (0, 2, 3, 5)),
    ],
)
def test_starts_are_the_known_positions(length, tile, step, expected):
    assert tile_starts(length, tile, step) == expected


@pytest.mark.parametrize("step", [0.3, 0.5, 0.71, 1.0])
def test_tiles_cover_every_voxel_and_end_at_the_border(step):
    for length in range(5, 60):
        for tile in range(1, 6):
            starts = tile_starts(length, tile, step)
            assert starts[0] == 0
            assert starts[-1] == length - tile
            assert max(np.diff(starts), default=0) <= max(math.ceil(tile * step), 1)


def test_a_tile_longer_than_its_axis_is_refused():
    with pytest.raises(ValueError, match="tile is 6 voxels, axis only 5; pad first"):
        tile_starts(5, 6, 0.5)


@pytest.mark.parametrize("step", [0.0, -0.5, 1.1])
def test_a_step_out_of_range_is_refused(step):
    with pytest.raises(ValueError, match="step must be in"):
        tile_starts(9, 3, step)


def test_odd_padding_goes_after():
    assert padding((4, 7, 3), (7, 7, 8)) == ((1, 2), (0, 0), (2, 3))


def test_slices_are_never_padded_along_their_axis():
    assert padding((1, 7, 3), (8, 8)) == ((0, 0), (0, 1), (2, 3))


def test_indices_of_a_2d_tile_visit_every_slice():
    indices = tile_indices((3, 5, 6), (4, 6), 1.0)
    assert indices == [
        (k, slice(start, start + 4), slice(0, 6)) for k in range(3) for start in (0, 1)
    ]


@pytest.mark.parametrize(
    ("shape", "tile"), [((9, 17, 5), (4, 8, 7)), ((9, 17, 5), (8, 7)), ((3, 2, 2), (4, 4, 4))]
)
def test_num_tiles_counts_the_indices_of_the_padded_image(shape, tile):
    padded = [n + a + b for n, (a, b) in zip(shape, padding(shape, tile), strict=True)]
    assert num_tiles(shape, tile, 0.5) == len(tile_indices(padded, tile, 0.5))


def slow_importance(tile):
    """Truncated, normalised Gaussian along each axis, written out."""
    weight = np.ones(tile)
    for axis, size in enumerate(tile):
        sigma = size / 8
        radius = int(4 * sigma + 0.5)
        values = np.zeros(size)
        for position in range(size):
            if abs(position - size // 2) <= radius:
                values[position] = math.exp(-((position - size // 2) ** 2) / (2 * sigma**2))
        shape = [1] * len(tile)
        shape[axis] = size
        weight = weight * values.reshape(shape)
    return weight


@pytest.mark.parametrize("tile", [(12, 9), (16, 7, 11)])
def test_importance_is_a_gaussian_of_peak_one_and_never_zero(tile):
    weight = importance(tile)
    assert weight.dtype == np.float32
    assert weight[tuple(size // 2 for size in tile)] == weight.max() == 1
    assert weight.min() > 0
    np.testing.assert_allclose(weight, slow_importance(tile), rtol=1e-5)


def test_importance_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        importance((4, 4))[0, 0] = 3


def torch_importance(tile, peak, kind):
    """Return the weights as the reference makes them: cast by torch, zeros replaced afterwards."""
    impulse = np.zeros(tile)
    impulse[tuple(size // 2 for size in tile)] = 1
    smooth = ndimage.gaussian_filter(impulse, [size / 8 for size in tile], mode="constant")
    weight = torch.from_numpy(smooth)
    weight = (weight / (weight.max() / peak)).to(kind)
    smallest = weight[weight != 0].min()
    return torch.where(weight == 0, smallest, weight).numpy(), int((weight == 0).sum())


@pytest.mark.parametrize("tile", [(12, 9), (32, 48), (16, 7, 11), (24, 40, 32)])
@pytest.mark.parametrize("peak", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_importance_of_another_peak_and_type_is_that_of_the_reference(tile, peak, kind):
    weight = importance(tile, peak, kind)
    expected, _ = torch_importance(tile, peak, getattr(torch, kind))
    assert weight.dtype == np.dtype(kind)
    np.testing.assert_array_equal(weight, expected)
    assert weight[tuple(size // 2 for size in tile)] == weight.max() == peak
    assert not weight.flags.writeable


def test_weights_that_vanish_in_16_bits_become_the_smallest_that_does_not():
    weight = importance((24, 40, 32), 10.0, "float16")
    expected, vanished = torch_importance((24, 40, 32), 10.0, torch.float16)
    assert vanished > 100, "there must be such weights"
    smallest = expected.min()
    assert weight.min() == smallest > 0
    assert (weight == smallest).sum() >= vanished
    assert importance((24, 40, 32), 10.0).min() < smallest


def test_a_peak_only_scales_the_weights():
    tile = (16, 7, 11)
    np.testing.assert_allclose(importance(tile, 10.0), 10 * importance(tile), rtol=1e-6)
    np.testing.assert_array_equal(importance(tile, 1.0, "float32"), importance(tile))
