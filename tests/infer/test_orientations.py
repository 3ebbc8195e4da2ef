"""However an image is stored, its prediction is the same segmentation in world space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.infer.loading import load


def stored_ways(shape, affine):
    """Yield, for all 48 ways of storing an image, a function for arrays and the new affine."""
    for order in itertools.permutations(range(3)):
        for reversed_axes in itertools.product((False, True), repeat=3):
            matrix = np.zeros((4, 4))
            matrix[3, 3] = 1
            for d, axis in enumerate(order):
                matrix[axis, d] = -1 if reversed_axes[d] else 1
                matrix[axis, 3] = shape[axis] - 1 if reversed_axes[d] else 0
            flipped = [d for d in range(3) if reversed_axes[d]]
            yield order, flipped, affine @ matrix


def stored(array, order, flipped):
    """Return (..., I, J, K) with its last three axes in another order and direction."""
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in order))
    return np.ascontiguousarray(np.flip(moved, [lead + d for d in flipped]))


def label_at(segmentation, affine, points):
    """Look up labels at world positions (mm)."""
    index = np.linalg.solve(affine, np.c_[points, np.ones(len(points))].T)[:3]
    nearest = np.rint(index).astype(int)
    np.testing.assert_allclose(index, nearest, atol=1e-6)
    return segmentation[tuple(nearest)]


VARIANTS = {
    "3d": {"spacing": (2.0, 0.9, 1.2), "patch_size": (8, 16, 12), "network_axes": (2, 0, 1)},
    "separate-axis": {
        "spacing": (3.6, 0.9, 0.7),
        "patch_size": (4, 16, 16),
        "network_axes": (2, 1, 0),
    },
    "2d": {"spacing": (2.4, 1.0, 1.1), "patch_size": (12, 16), "network_axes": (2, 0, 1)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_all_48_ways_of_storing_give_one_segmentation(make, tmp_path, name):
    plans = make.plans(**VARIANTS[name])
    bundle = make.bundle(tmp_path / "bundle", plans=plans, folds=1)
    model = load(bundle.folder, device="cpu", mode="exact")
    affine = make.oblique((0.85, 1.3, 3.1 if name == "separate-axis" else 2.4))
    channels = make.channels((13, 11, 9))
    points = np.argwhere(np.ones(channels.shape[1:], bool)) @ affine[:3, :3].T + affine[:3, 3]

    reference = model.predict((channels, affine), tta="flips")
    expected = label_at(reference.segmentation, affine, points)
    assert len(np.unique(expected)) >= 3, "several labels must occur"
    box = [high - low for low, high in reference.record.box]
    assert np.prod(box) < expected.size, "the crop must be active"
    assert reference.record.shape_network != reference.record.shape_cropped
    seen = set()
    for order, flipped, moved in stored_ways(channels.shape[1:], affine):
        result = model.predict((stored(channels, order, flipped), moved), tta="flips")
        np.testing.assert_array_equal(label_at(result.segmentation, moved, points), expected)
        np.testing.assert_array_equal(
            result.segmentation, stored(reference.segmentation, order, flipped)
        )
        np.testing.assert_array_equal(result.affine, moved)
        seen.add((result.record.axes, result.record.flips))
    assert len(seen) == 48


def test_the_fixture_tells_left_from_right(make, tmp_path):
    """A network that ignored the orientation would fail: a mirrored image gives other labels."""
    model = load(make.bundle(tmp_path / "bundle", folds=1).folder, device="cpu", mode="exact")
    affine, channels = make.oblique(), make.channels((13, 11, 9))
    straight = model.predict((channels, affine), tta="flips").segmentation
    mirrored = model.predict((channels, affine @ np.diag([-1.0, 1, 1, 1])), tta="none").segmentation
    assert (straight != mirrored).mean() > 0.05
