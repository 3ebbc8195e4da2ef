"""Surface distances against a comparison of every voxel with every voxel."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from medseg.metrics.surface import hd95_mm, nsd, surface, surface_distances

SPACING = (0.7, 1.9, 3.1)


def blob(shape, seed, share=0.35):
    """Return a rugged mask that fills a share of the voxels."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 1.2, mode="constant")
    return smooth > np.quantile(smooth, 1 - share)


def obvious_surface(mask, valid):
    """List the voxels of a structure with a neighbour outside it, one voxel at a time."""
    found = []
    for index in itertools.product(*map(range, mask.shape)):
        if not (mask[index] and valid[index]):
            continue
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            if mask.shape[axis] == 1:
                continue
            near = list(index)
            near[axis] += step
            beyond = not 0 <= near[axis] < mask.shape[axis]
            if beyond or (valid[tuple(near)] and not mask[tuple(near)]):
                found.append(index)
                break
    return np.array(found, dtype=float).reshape(-1, mask.ndim)


def obvious_distances(points, targets, spacing):
    if len(targets) == 0:
        return np.full(len(points), np.inf)
    steps = (points[:, None] - targets[None]) * np.array(spacing)
    return np.sqrt((steps**2).sum(-1)).min(1)


@pytest.mark.parametrize("shape", [(13, 9, 6), (13, 1, 7), (1, 11, 17)])
@pytest.mark.parametrize("has_valid", [True, False])
def test_distances_equal_a_comparison_of_all_pairs(shape, has_valid):
    prediction, reference = blob(shape, 1), blob(shape, 2)
    valid = blob(shape, 3, share=0.7) | (not has_valid)
    ours, theirs = obvious_surface(prediction, valid), obvious_surface(reference, valid)
    found = surface_distances(
        prediction, reference, spacing=SPACING, valid=valid if has_valid else None
    )
    expected = (
        obvious_distances(ours, theirs, SPACING),
        obvious_distances(theirs, ours, SPACING),
    )
    assert min(len(ours), len(theirs)) > 10
    np.testing.assert_allclose(np.sort(found.to_reference), np.sort(expected[0]), atol=1e-12)
    np.testing.assert_allclose(np.sort(found.to_prediction), np.sort(expected[1]), atol=1e-12)
    assert hd95_mm(found) == pytest.approx(max(np.percentile(one, 95) for one in expected))
    within = sum(int((one <= 1.9).sum()) for one in expected)
    assert nsd(found, 1.9) == pytest.approx(within / sum(map(len, expected)))


def test_surface_of_a_block_at_the_border_of_the_image():
    mask = np.zeros((5, 6, 7), bool)
    mask[:4, 1:5, 2:6] = True
    expected = mask.copy()
    expected[1:3, 2:4, 3:5] = False
    np.testing.assert_array_equal(surface(mask), expected)


def test_border_to_ignored_voxels_is_no_surface():
    mask = np.zeros((9, 1, 1), bool)
    mask[2:5] = True
    valid = np.ones_like(mask)
    valid[5:] = False
    assert np.flatnonzero(surface(mask, valid=valid)).tolist() == [2]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distance_of_two_plates_is_their_gap_in_mm(axis):
    prediction, reference = np.zeros((2, 9, 8, 7), bool)
    np.moveaxis(prediction, axis, 0)[1] = True
    np.moveaxis(reference, axis, 0)[4] = True
    distances = surface_distances(prediction, reference, spacing=SPACING)
    assert hd95_mm(distances) == pytest.approx(3 * SPACING[axis])
    assert nsd(distances, 3 * SPACING[axis]) == 1
    assert nsd(distances, 2.9 * SPACING[axis]) == 0


def test_outliers_below_five_percent_do_not_move_hd95():
    prediction, reference = np.zeros((2, 200, 3, 3), bool)
    reference[:100, 1, 1] = prediction[:100, 1, 1] = True
    prediction[196:200, 1, 1] = True
    assert hd95_mm(surface_distances(prediction, reference, spacing=SPACING)) == 0
    prediction[180:200, 1, 1] = True
    assert hd95_mm(surface_distances(prediction, reference, spacing=SPACING)) > 50


def test_empty_structures():
    some, none = blob((5, 6, 7), 1), np.zeros((5, 6, 7), bool)
    both = surface_distances(none, none, spacing=SPACING)
    assert (hd95_mm(both), nsd(both, 1.0)) == (None, None)
    for pair in ((some, none), (none, some)):
        distances = surface_distances(*pair, spacing=SPACING)
        assert (hd95_mm(distances), nsd(distances, 1e9)) == (None, 0)
