"""Facts of a case against the obvious way, however it is stored; their spread against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.data.facts import border_counts, count_values, intensities, summarise, voxel_ml
from medseg.schema.fingerprint import CaseFingerprint, ChannelIntensities


def stored(array, affine, order, flips):
    """Store (..., I, J, K) another way: axis d of the result is axis order[d], reversed or not."""
    lead, columns, origin = array.ndim - 3, affine[:3, :3], affine[:3, 3].copy()
    turned = np.eye(4)
    for d, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        turned[:3, d] = -columns[:, axis] if flip else columns[:, axis]
        origin += columns[:, axis] * (array.shape[lead + axis] - 1) * flip
    turned[:3, 3] = origin
    view = array.transpose(*range(lead), *(lead + axis for axis in order))
    return np.flip(view, [lead + d for d, flip in enumerate(flips) if flip]), turned


def values_of(facts):
    return [tuple(fact.model_dump().values()) for fact in facts]


def test_small_images_are_measured_whole_where_not_zero_and_finite(datasets):
    channels = np.random.default_rng(1).normal(-3, 40, (2, 13, 32, 7)).astype(np.float32)
    channels[:, 2:9, 4:20] = 0
    expected = [np.percentile(channel[channel != 0], (0.5, 50, 99.5)) for channel in channels]
    affine = datasets.affine()
    np.testing.assert_allclose(values_of(intensities(channels, affine)), expected, rtol=1e-5)
    holes = channels.copy()
    holes[0, 3, 5, :3] = np.nan, np.inf, -np.inf
    assert intensities(holes, affine) == intensities(channels, affine)


def test_large_images_are_measured_on_every_third_or_second_voxel(datasets):
    channel = np.random.default_rng(2).gamma(2, 90, (70, 9, 40)).astype(np.float32)
    affine = np.diag([1.2, 0.7, 3.0, 1.0])
    expected = np.percentile(channel[::3, :, ::2], (0.5, 50, 99.5))
    np.testing.assert_allclose(values_of(intensities(channel[None], affine))[0], expected, 1e-5)


def test_all_48_ways_of_storing_an_image_give_the_same_intensities(datasets):
    channels = np.random.default_rng(3).gamma(2, 90, (2, 70, 9, 40)).astype(np.float32)
    affine = datasets.affine()
    expected = intensities(channels, affine)
    assert expected[0] != expected[1]
    for order in itertools.permutations(range(3)):
        for flips in itertools.product([False, True], repeat=3):
            assert intensities(*stored(channels, affine, order, flips)) == expected


def test_an_image_of_zeros_has_intensities_of_zero(datasets):
    (found,) = intensities(np.zeros((1, 4, 5, 6), np.float32), datasets.affine())
    assert set(found.model_dump().values()) == {0.0}


def test_the_volume_of_a_voxel_is_that_of_its_sides(datasets):
    assert voxel_ml(datasets.affine((0.5, 2.0, 3.0))) == pytest.approx(0.003)
    mirrored = datasets.affine((0.5, 2.0, 3.0)) @ np.diag([-1, 1, 1, 1])
    assert voxel_ml(mirrored) == pytest.approx(0.003)


@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 1, 4), (2, 7, 3), (1, 1, 5)])
def test_every_voxel_of_the_border_counts_once(shape):
    """Oracle: a mask of the outermost voxels along every axis longer than one voxel."""
    labels = np.random.default_rng(4).integers(-1, 4, shape).astype(np.int16)
    mask = np.zeros(shape, bool)
    for axis, length in enumerate(shape):
        if length > 1:
            np.moveaxis(mask, axis, 0)[[0, -1]] = True
    counts = border_counts(labels, {-1, 2})
    assert sum(counts.values()) == np.isin(labels[mask], (-1, 2)).sum() > 0
    assert set(counts) == {(a, end) for a, n in enumerate(shape) for end in (False, True) if n > 1}
    assert count_values(labels, {-1, 2}) == np.isin(labels, (-1, 2)).sum()


def test_each_plane_is_told_from_the_others():
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[2:4, 4, 1:3] = 7
    assert border_counts(labels, {7}) == {
        (0, False): 0, (0, True): 0, (1, False): 0, (1, True): 4, (2, False): 0, (2, True): 0,
    }  # fmt: skip


def case(number, **values):
    facts = ChannelIntensities(percentile_00_5=-number, median=number**2, percentile_99_5=number**3)
    return CaseFingerprint(
        shape=(9, 8, 7),
        shape_cropped=(9, 8, 6),
        spacing=(1.0, 1.5 + number, 2.0),
        intensities=(facts, facts),
        **values,
    )


def percentiles(values):
    names = ("min", "percentile_05", "median", "percentile_95", "max")
    found = np.percentile(values, (0, 5, 50, 95, 100))
    return pytest.approx(dict(zip(names, found, strict=True)), rel=1e-5)


def test_the_spread_over_cases_is_numpys():
    cases = [
        case(1, volumes_ml={"organ": 2.5, "lesion": 0.0}, border_share=0.0),
        case(2, volumes_ml={"organ": 3.0}),
        case(7, volumes_ml={"organ": 9.0, "lesion": 0.25}, border_share=0.5),
        case(5),
    ]
    found = summarise(cases)
    assert found.num_cases == 4
    assert found.spacing[0].model_dump() == percentiles([1.0])
    assert found.spacing[1].model_dump() == percentiles([2.5, 3.5, 8.5, 6.5])
    assert len(found.channels) == 2
    assert found.channels[1].percentile_00_5.model_dump() == percentiles([-1, -2, -7, -5])
    assert found.channels[1].median.model_dump() == percentiles([1, 4, 49, 25])
    assert found.channels[1].percentile_99_5.model_dump() == percentiles([1, 8, 343, 125])
    organ, lesion = found.structures["organ"], found.structures["lesion"]
    assert (organ.num_annotated, organ.num_present) == (3, 3)
    assert organ.volume_ml.model_dump() == percentiles([2.5, 3.0, 9.0])
    assert (lesion.num_annotated, lesion.num_present) == (2, 1)
    assert lesion.volume_ml.model_dump() == percentiles([0.25])
    assert found.border_share.model_dump() == percentiles([0.0, 0.5])


def test_cases_that_were_measured_by_an_earlier_version_are_left_out():
    old = CaseFingerprint(shape=(9, 8, 7), shape_cropped=(9, 8, 6), spacing=(9.0, 9.0, 9.0))
    assert summarise([case(1), old, case(2)]) == summarise([case(1), case(2)])
    assert summarise([old]) is None
    assert summarise([]) is None


def test_a_structure_that_never_is_there_has_no_volume():
    found = summarise([case(1, volumes_ml={"lesion": 0.0})])
    assert found.structures["lesion"].num_annotated == 1
    assert found.structures["lesion"].volume_ml is None
    assert found.border_share is None
