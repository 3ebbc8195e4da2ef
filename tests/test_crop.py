"""Cropping: the box and the mask equal the slow definitions."""

import numpy as np
import pytest
from scipy import ndimage

from medseg.crop import bounding_box, crop, nonzero_mask


def slow_mask(channels):
    return ndimage.binary_fill_holes((channels != 0).any(axis=0))


def slow_box(mask):
    points = np.argwhere(mask)
    return tuple((int(column.min()), int(column.max()) + 1) for column in points.T)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_mask_equals_filling_holes_step_by_step(density, seed):
    rng = np.random.default_rng(seed)
    channels = np.zeros((2, 9, 14, 11), dtype=np.float32)
    values = rng.normal(size=(2, 6, 14, 7))
    channels[:, 2:8, :, 1:8] = values * (rng.random(values.shape) < density)
    mask = nonzero_mask(channels)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, slow_mask(channels))


def test_cavity_is_filled_and_tunnel_to_the_border_is_not():
    channels = np.zeros((1, 7, 8, 9), dtype=np.float32)
    channels[0, 1:6, 1:7, 0:8] = -3
    channels[0, 2:4, 2:5, 3:6] = 0
    closed = nonzero_mask(channels)
    assert closed[3, 3, 4]
    channels[0, 3, 3, 0:4] = 0
    opened = nonzero_mask(channels)
    assert not opened[3, 3, 4]
    np.testing.assert_array_equal(opened, slow_mask(channels))


def test_a_hole_that_touches_the_rest_only_by_an_edge_is_closed():
    channels = np.ones((1, 3, 4, 5), dtype=np.float32)
    channels[0, 0, 0, 2] = channels[0, 1, 1, 2] = 0
    expected = np.ones((3, 4, 5), dtype=bool)
    expected[0, 0, 2] = False
    np.testing.assert_array_equal(nonzero_mask(channels), expected)


def test_a_solid_block_is_its_own_mask():
    channels = np.zeros((1, 6, 7, 8), dtype=np.float32)
    channels[0, 1:4, 2:7, 3:5] = 9
    np.testing.assert_array_equal(nonzero_mask(channels), channels[0] != 0)


def test_mask_of_flat_images_equals_the_slow_one():
    rng = np.random.default_rng(5)
    channels = (rng.random((1, 23, 17)) < 0.7).astype(np.float32)
    np.testing.assert_array_equal(nonzero_mask(channels), slow_mask(channels))


def test_box_holds_every_voxel_of_any_channel():
    channels = np.zeros((2, 6, 9, 13), dtype=np.float32)
    channels[0, 2, 3, 4] = 1
    channels[1, 4, 3, 11] = np.nan
    mask = nonzero_mask(channels)
    assert bounding_box(mask) == slow_box(mask) == ((2, 5), (3, 4), (4, 12))


def test_empty_mask_gives_the_whole_image():
    channels = np.zeros((2, 6, 9, 13), dtype=np.float32)
    mask = nonzero_mask(channels)
    assert not mask.any()
    assert bounding_box(mask) == ((0, 6), (0, 9), (0, 13))


def test_crop_is_a_view_of_the_last_axes():
    array = np.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    cut = crop(array, ((1, 3), (0, 5), (4, 6)))
    assert np.shares_memory(cut, array)
    np.testing.assert_array_equal(cut, array[:, 1:3, :, 4:6])
    np.testing.assert_array_equal(crop(array[1], ((1, 3), (0, 5), (4, 6))), cut[1])
