"""Simulated examinations."""

import numpy as np
import pytest

from medseg.mr import phantom
from medseg.mr.anatomy import LOWER_MM, SHAPE, SPACING_MM, Kind
from medseg.mr.phantom import CHANNELS, FIELD_OF_VIEW_MM, LABELS, SCANS, simulate


@pytest.fixture(scope="module")
def examination():
    """Return one oblique examination."""
    return simulate(np.random.default_rng(4), scan="oblique")


def test_every_label_is_there_and_images_share_the_grid(examination):
    """Three images and one segmentation on one small grid, whole numbers that fit 16 bits."""
    images, segmentation = examination.images, examination.segmentation
    assert images.shape == (len(CHANNELS), *segmentation.shape)
    assert images.dtype == np.float32
    assert segmentation.dtype == np.uint8
    assert set(np.unique(segmentation)) == set(LABELS.values())
    assert (segmentation == LABELS["lesion"]).sum() > 100
    assert segmentation.size <= 80 * 66 * 64
    assert images.min() >= 0
    assert images.max() < 2**15
    assert np.array_equal(images, np.rint(images))


def test_contrast_is_that_of_the_sequences(examination):
    """Medians of the labelled tissues come in the order of each sequence, bias and noise or no."""
    median = {
        name: np.median(examination.images[:, examination.segmentation == value], axis=1)
        for name, value in LABELS.items()
    }
    t1w, t2w, flair = range(3)
    assert median["white"][t1w] > median["grey"][t1w] > median["fluid"][t1w]
    assert median["fluid"][t2w] > median["lesion"][t2w] > median["grey"][t2w]
    assert median["grey"][t2w] > median["white"][t2w]
    assert median["lesion"][flair] > median["grey"][flair] > median["fluid"][flair]


def test_unknown_scan_is_refused():
    """The message lists what there is."""
    with pytest.raises(ValueError, match="scan is 'helical'; expected one of: isotropic, axial"):
        simulate(np.random.default_rng(0), scan="helical")


@pytest.mark.parametrize("name", SCANS)
def test_grids_cover_the_head_in_any_storage_order(name):
    """Spacing stays within the scan's range, the centre and the field of view do not move."""
    orders = set()
    for seed in range(40):
        shape, affine = phantom._random_grid(np.random.default_rng(seed), SCANS[name])
        columns = affine[:3, :3]
        middle = columns @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
        assert middle == pytest.approx(phantom.CENTRE_MM, abs=1e-9)
        axes = np.abs(columns).argmax(axis=0)
        assert sorted(axes) == [0, 1, 2]
        for d, axis in enumerate(axes):
            length = float(np.linalg.norm(columns[:, d]))
            low, high = SCANS[name].spacing_mm[axis]
            assert low - 0.01 <= length <= high + 0.01
            assert abs(shape[d] * length - FIELD_OF_VIEW_MM[axis]) <= length
        tilt = np.rad2deg(np.arccos(np.abs(columns).max(axis=0) / np.linalg.norm(columns, axis=0)))
        assert tilt.max() <= SCANS[name].tilt_deg[1] + 1e-6
        orders.add((tuple(axes), tuple(np.sign(columns[axes, range(3)]))))
    assert len(orders) > 15


def test_tissue_shares_equal_counting_points_one_by_one():
    """Partial volume is the share of nearest lattice voxels over evenly spread points."""
    rng = np.random.default_rng(1)
    head = rng.integers(0, len(Kind), SHAPE).astype(np.uint8)
    shape = (3, 2, 4)
    to_head = np.eye(4)
    to_head[:3, :3] = phantom._rotation(rng, 25.0) @ np.diag([2.5, 1.2, 4.0])
    to_head[:3, 3] = (-3.0, 4.0, 7.0)
    found = phantom._tissue_shares(head, shape, to_head)
    steps = (2, 1, 4)
    for voxel in np.ndindex(*shape):
        counts = np.zeros(len(Kind))
        for offset in np.ndindex(*steps):
            inside = [(o + 0.5) / n - 0.5 for o, n in zip(offset, steps, strict=True)]
            point = to_head[:3, :3] @ (np.array(voxel) + inside) + to_head[:3, 3]
            nearest = np.rint((point - LOWER_MM) / SPACING_MM).astype(int)
            counts[head[tuple(nearest)]] += 1
        assert found[(slice(None), *voxel)] == pytest.approx(counts / counts.sum(), abs=1e-6)


def test_label_is_the_largest_summed_share():
    """Faint and full lesions count together; kinds without a label are background together."""
    shares = np.zeros((len(Kind), 3, 1, 1), np.float32)
    shares[[Kind.LESION, Kind.FAINT_LESION, Kind.WHITE], 0] = [[[0.3]], [[0.3]], [[0.4]]]
    shares[[Kind.FAT, Kind.BONE, Kind.FLUID], 1] = [[[0.3]], [[0.3]], [[0.4]]]
    shares[[Kind.GREY, Kind.WHITE], 2] = [[[0.6]], [[0.4]]]
    assert phantom._label(shares).ravel().tolist() == [LABELS["lesion"], 0, LABELS["grey"]]


def test_coil_sensitivity_is_smooth_and_strong():
    """The bias field has mean one, its strongest place is 2.2 to 3.4 times its weakest."""
    affine = np.diag([2.6, 3.1, 3.9, 1.0])
    affine[:3, 3] = (-78, -95, -73)
    field = phantom._coil_sensitivity((60, 62, 38), affine, np.random.default_rng(8))
    assert field.shape == (60, 62, 38)
    assert float(field.mean()) == pytest.approx(1, abs=0.1)
    assert 2.2 < field.max() / field.min() < 3.4
    assert max(float(np.abs(np.diff(field, axis=d)).max()) for d in range(3)) < 0.12
