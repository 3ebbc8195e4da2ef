"""Case statistics against plain numpy on the drawn voxels, and their pooling."""

import itertools

import numpy as np
import pytest

from medseg.errors import DatasetError
from medseg.plan import fingerprint
from medseg.plan.fingerprint import (
    Samples,
    case_fingerprint,
    draw_samples,
    percentiles,
    pool,
    samples_per_case,
    times_drawn,
)

SPACING = (0.8, 1.5, 3.0)


def _oblique():
    """Return an affine whose axes point left, forward and up, 10 degrees off."""
    turn = np.deg2rad(10)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-SPACING[0], SPACING[1], SPACING[2]])
    affine[:3, 3] = (40, -30, 7)
    return affine


def _case(seed=0, num_channels=2):
    """Return channels (C, 11, 9, 7) with a margin of zeros, an affine and a segmentation."""
    generator = np.random.default_rng(seed)
    channels = np.zeros((num_channels, 11, 9, 7), np.float32)
    channels[:, 2:9, 1:9, 0:5] = generator.normal(50, 20, (num_channels, 7, 8, 5))
    segmentation = np.zeros((11, 9, 7), np.uint8)
    segmentation[3:7, 2:6, 1:4] = generator.integers(0, 3, (4, 4, 3))
    segmentation[0, 0, 6] = 1  # outside the non-zero box: not foreground
    return channels, _oblique(), segmentation


def _stored(channels, affine, segmentation, order, flips):
    """Store a case another way: image axis d of the result is axis order[d], reversed or not."""
    columns, origin = affine[:3, :3], affine[:3, 3].copy()
    turned = np.eye(4)
    for d, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        turned[:3, d] = -columns[:, axis] if flip else columns[:, axis]
        if flip:
            origin += columns[:, axis] * (segmentation.shape[axis] - 1)
    turned[:3, 3] = origin
    reverse = tuple(slice(None, None, -1 if flip else 1) for flip in flips)
    spatial = segmentation.transpose(order)[reverse]
    images = channels.transpose(0, *(1 + axis for axis in order))[(slice(None), *reverse)]
    return images, turned, spatial


def test_shape_box_and_spacing_are_canonical():
    channels, affine, segmentation = _case()
    found = case_fingerprint(channels, affine, segmentation, num_samples=10)
    assert found.case.shape == (11, 9, 7)
    assert found.case.shape_cropped == (7, 8, 5)
    assert found.case.spacing == SPACING
    assert found.relative_size == pytest.approx(7 * 8 * 5 / (11 * 9 * 7))


def test_draws_equal_the_plain_way():
    """Oracle: one legacy generator, `choice` from the voxels of a (K, J, I) array."""
    channels, affine, segmentation = _case()
    found = case_fingerprint(channels, affine, segmentation, num_samples=1000)
    generator = np.random.RandomState(1234)
    for channel, samples in zip(channels, found.samples, strict=True):
        upright = channel[::-1][2:9, 1:9, 0:5].T
        mask = segmentation[::-1][2:9, 1:9, 0:5].T > 0
        drawn = generator.choice(upright[mask], 1000, replace=True)
        np.testing.assert_array_equal(np.repeat(samples.values, samples.counts), np.sort(drawn))


def test_all_48_ways_of_storing_a_case_give_the_same_statistics():
    case = _case()
    expected = case_fingerprint(*case, num_samples=200)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product([False, True], repeat=3):
            stored = _stored(*case, order, flips)
            found = case_fingerprint(*stored, num_samples=200)
            assert found.case == expected.case, (order, flips)
            for a, b in zip(found.samples, expected.samples, strict=True):
                np.testing.assert_array_equal(a.values, b.values)
                np.testing.assert_array_equal(a.counts, b.counts)


def test_single_precision_headers_do_not_blur_equal_spacings():
    """Columns of a rotated float32 matrix differ in the eighth digit; their lengths must not."""
    channels, affine, segmentation = _case()
    affine[:3, :3] *= 0.7 / np.array(SPACING)
    affine = np.float32(affine)
    lengths = np.linalg.norm(affine[:3, :3].astype(np.float64), axis=0)
    assert len(set(lengths)) > 1
    found = case_fingerprint(channels, affine, segmentation, num_samples=1)
    assert found.case.spacing == (0.7, 0.7, 0.7)


def test_pieces_of_a_draw_equal_one_draw(monkeypatch):
    channels, _, segmentation = _case()
    foreground = segmentation > 0
    whole = draw_samples(channels, foreground, num_samples=1000, seed=3)
    monkeypatch.setattr(fingerprint, "DRAW", 64)
    pieces = draw_samples(channels, foreground, num_samples=1000, seed=3)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.counts, b.counts)


def test_pooled_statistics_equal_those_of_all_draws_together():
    cases = {f"case_{seed}": case_fingerprint(*_case(seed), num_samples=333) for seed in range(5)}
    pooled = pool(cases)
    assert list(pooled.cases) == list(cases)
    for index, channel in enumerate(pooled.channels):
        tables = [item.samples[index] for item in cases.values()]
        drawn = np.concatenate([np.repeat(t.values, t.counts) for t in tables]).astype(np.float64)
        assert len(drawn) == 5 * 333
        low, median, high = np.percentile(drawn, (0.5, 50, 99.5))
        expected = {
            "mean": drawn.mean(),
            "std": drawn.std(),
            "median": median,
            "min": drawn.min(),
            "max": drawn.max(),
            "percentile_00_5": low,
            "percentile_99_5": high,
        }
        assert channel.model_dump() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_draws", [1, 2, 3, 40, 1001])
def test_percentiles_of_tables_equal_numpy(num_draws):
    """Negative values, zeros of both signs, repeats and one table far from the other."""
    generator = np.random.default_rng(num_draws)
    drawn = np.round(generator.normal(0, 3, num_draws)).astype(np.float32) * np.float32(1e-3)
    drawn[::7] += 1e20
    tables = []
    for part in np.array_split(drawn, min(3, num_draws)):
        values, counts = np.unique(part, return_counts=True)
        tables.append(Samples(values=values, counts=counts.astype(np.int32)))
    percents = (0.5, 33.3, 50.0, 99.5)
    expected = np.percentile(drawn.astype(np.float64), percents)
    assert percentiles(tables, percents) == pytest.approx(expected, rel=1e-9)


def test_cases_without_foreground_or_labels_add_no_intensities():
    channels, affine, segmentation = _case()
    full = case_fingerprint(channels, affine, segmentation, num_samples=50)
    empty = case_fingerprint(channels, affine, np.zeros_like(segmentation), num_samples=50)
    bare = case_fingerprint(channels, affine, None, num_samples=50)
    assert pool({"a": full, "b": empty, "c": bare}).channels == pool({"a": full}).channels
    with pytest.raises(DatasetError, match="no case has a foreground voxel"):
        pool({"b": empty, "c": bare})


def test_an_image_of_zeros_is_not_cropped():
    _, affine, segmentation = _case()
    zeros = np.zeros((1, 11, 9, 7), np.float32)
    found = case_fingerprint(zeros, affine, segmentation, num_samples=5)
    assert found.case.shape_cropped == (11, 9, 7)
    assert found.relative_size == 1


def test_pool_refuses_nothing_and_differing_channels():
    with pytest.raises(DatasetError, match="no case"):
        pool({})
    one = case_fingerprint(*_case(num_channels=1), num_samples=5)
    two = case_fingerprint(*_case(num_channels=2), num_samples=5)
    with pytest.raises(DatasetError, match=r"number of channels: \{'a': 1, 'b': 2\}"):
        pool({"a": one, "b": two})


def test_the_median_case_decides_the_relative_size():
    channels, affine, segmentation = _case()
    small = case_fingerprint(channels, affine, segmentation, num_samples=5)
    whole = case_fingerprint(channels + 1, affine, segmentation, num_samples=5)
    pooled = pool({"a": small, "b": whole, "c": small})
    assert pooled.median_relative_size_after_cropping == small.relative_size
    assert whole.relative_size == 1


def test_samples_of_a_data_set_are_a_hundred_million():
    assert samples_per_case(1) == 100_000_000
    assert samples_per_case(3) == 33_333_333


@pytest.mark.parametrize("num_pixels", [2, 3, 255, 256, 257, 1500, 4096, 65_536])
@pytest.mark.parametrize("num_samples", [1, 1023, 60_000])
def test_the_shared_stream_draws_as_the_generator_does(num_pixels, num_samples):
    drawn = np.random.RandomState(77).randint(0, num_pixels, num_samples)
    times = times_drawn(num_pixels, num_samples, 77)
    np.testing.assert_array_equal(times, np.bincount(drawn, minlength=num_pixels))


def test_more_draws_than_the_stream_has_are_left_to_the_generator(monkeypatch):
    monkeypatch.setattr(fingerprint, "_STREAM_LIMIT", 1000)
    assert times_drawn(129, 5000, 3) is None
