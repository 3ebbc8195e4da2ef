"""The drawn head."""

import numpy as np
import pytest
from scipy import ndimage

from medseg.mr.anatomy import LOWER_MM, SHAPE, SPACING_MM, Kind, Points, _tube, draw_head

INSIDE = (Kind.FLUID, Kind.GREY, Kind.WHITE, Kind.LESION, Kind.FAINT_LESION)


@pytest.fixture(scope="module")
def head():
    """Return one head."""
    return draw_head(np.random.default_rng(11))


def ml(mask):
    """Volume of a mask in ml."""
    return mask.sum() * SPACING_MM**3 / 1000


def test_volumes_are_those_of_a_small_brain_with_lesions(head):
    """All tissues are there, in plausible amounts."""
    assert head.shape == SHAPE
    assert set(np.unique(head)) == {int(kind) for kind in Kind}
    assert 250 < ml(head == Kind.WHITE) < 600
    assert 250 < ml(head == Kind.GREY) < 600
    assert 150 < ml(head == Kind.FLUID) < 600
    assert 3 < ml(np.isin(head, (Kind.LESION, Kind.FAINT_LESION))) < 40


def test_another_generator_gives_another_head_of_the_same_build(head):
    """Heads differ in many voxels, and by far not in all."""
    other = draw_head(np.random.default_rng(12))
    assert 0.02 < (other != head).mean() < 0.3


def test_brain_lies_within_bone(head):
    """Above the neck only bone touches the cranial cavity from outside."""
    cavity = np.isin(head, INSIDE)
    rim = ndimage.binary_dilation(cavity) & ~cavity
    rim[:, :, : int((-50 - LOWER_MM[2]) / SPACING_MM)] = False
    assert (head[rim] == Kind.BONE).mean() > 0.995


def test_cortex_is_a_ribbon_between_fluid_and_white_matter(head):
    """Nearly all cerebral white matter is parted from the outer fluid by grey matter."""
    low = int((5 - LOWER_MM[2]) / SPACING_MM)
    upper = head[:, :, low:]
    outer = ndimage.binary_dilation(np.isin(upper, (Kind.BONE, Kind.MARROW)), iterations=5)
    touching = ndimage.binary_dilation((upper == Kind.FLUID) & outer)
    assert (upper[touching] == Kind.WHITE).mean() < 0.01
    assert (upper[touching] == Kind.GREY).mean() > 0.1


def test_lesions_replace_white_matter_above_the_brain_stem(head):
    """Lesions are blobs of several voxels, none in the lower part of the head."""
    lesions = np.isin(head, (Kind.LESION, Kind.FAINT_LESION))
    labels, number = ndimage.label(lesions)
    sizes = np.bincount(labels.ravel())[1:]
    assert number >= 3
    assert np.median(sizes) > 60
    assert not lesions[:, :, : int((-8 - LOWER_MM[2]) / SPACING_MM)].any()


def test_tube_distance_equals_the_distance_to_dense_samples():
    """The tapered tube equals the nearest of many balls along its path, on both sides."""
    rng = np.random.default_rng(2)
    x, y, z = (rng.uniform(-30, 30, (4, 5, 3)).astype(np.float32) for _ in range(3))
    path, radii = ((5, -10, 3), (12, 6, -4), (20, 9, 8)), (3.0, 5.0, 2.0)
    found = _tube(Points(x=x, y=y, z=z), path, radii)
    place = np.stack([np.abs(x), y, z], axis=-1)
    expected = np.full(x.shape, np.inf)
    for start, end, r0, r1 in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        shares = np.linspace(0, 1, 2000)[:, None]
        balls = np.asarray(start) + shares * (np.asarray(end) - np.asarray(start))
        distance = np.linalg.norm(place[..., None, :] - balls, axis=-1)
        nearest = distance.argmin(axis=-1)
        reach = r0 + (r1 - r0) * shares[:, 0][nearest]
        expected = np.minimum(expected, distance.min(axis=-1) - reach)
    assert found == pytest.approx(expected, abs=0.02)
