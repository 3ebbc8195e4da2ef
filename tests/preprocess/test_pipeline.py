"""The pipeline against the same steps done slowly, and where a marked voxel ends up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from skimage.transform import resize as skimage_resize

from medseg.preprocess.pipeline import preprocess_case
from medseg.schema.fingerprint import IntensityStatistics
from tests.preprocess.small_plans import make_configuration, make_plans

STATISTICS = IntensityStatistics(
    mean=60.0, std=40.0, median=50, min=-90, max=300, percentile_00_5=-20, percentile_99_5=150
)
NETWORK_AXES = (2, 0, 1)


def run(channels, affine, configuration, segmentation=None, network_axes=NETWORK_AXES):
    return preprocess_case(
        channels,
        affine,
        plans=make_plans(configuration, network_axes, STATISTICS),
        configuration=configuration,
        segmentation=segmentation,
    )


@pytest.fixture
def case(datasets):
    """Two channels with a zero border, labels reaching into it, stored as P I L."""
    rng = np.random.default_rng(5)
    channels = np.zeros((2, 17, 13, 11), np.float32)
    channels[:, 2:15, 1:12, 3:10] = rng.normal(50, 30, size=(2, 13, 11, 7))
    segmentation = np.zeros((17, 13, 11), np.uint8)
    segmentation[4:9, 3:8, 4:8] = 1
    segmentation[6:12, 5:11, 5:9] = 2
    order, flips = (1, 2, 0), (True, True, True)
    affine = datasets.affine((1.3, 0.8, 1.1))
    stored = np.eye(4)
    for axis, (source, flip) in enumerate(zip(order, flips, strict=True)):
        stored[:3, axis] = -affine[:3, source] if flip else affine[:3, source]
    stored[:3, 3] = (5.0, -60.0, 31.0)
    return channels, segmentation, stored


def oriented_slowly(array, affine, network_axes):
    """Return the array on canonical axes in network order: try every way, keep the best."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(
        itertools.permutations(range(3)),
        key=lambda axes: sum(abs(directions[d, axes[d]]) for d in range(3)),
    )
    flips = [directions[d, best[d]] < 0 for d in range(3)]
    lead = array.ndim - 3
    out = np.transpose(array, (*range(lead), *(lead + axis for axis in best)))
    for d in range(3):
        if flips[d]:
            out = np.flip(out, lead + d)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[list(best)]
    out = np.transpose(out, (*range(lead), *(lead + axis for axis in network_axes)))
    return out, spacing[list(network_axes)]


def zscore_and_ct(image, inside):
    out = np.empty_like(image)
    values = image[0][inside].astype(np.float64)
    out[0] = np.where(inside, (image[0] - values.mean()) / values.std(), image[0])
    out[1] = (np.clip(image[1], -20, 150) - 60.0) / 40.0
    return out


def test_pipeline_is_orient_crop_normalise_resize(case):
    """Each step done by itself in the obvious way, the resize by scikit-image."""
    channels, segmentation, affine = case
    target = (1.0, 1.5, 1.0)
    prepared = run(channels, affine, make_configuration(target), segmentation)
    image, spacing = oriented_slowly(channels, affine, NETWORK_AXES)
    labels, _ = oriented_slowly(segmentation, affine, NETWORK_AXES)
    used = np.argwhere((image != 0).any(0))
    low, high = used.min(0), used.max(0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    image, labels = image[(slice(None), *box)], labels[box]
    shape = tuple(
        round(n * s / t) for n, s, t in zip(image.shape[1:], spacing, target, strict=True)
    )
    inside = (image != 0).any(0) | (labels > 0)
    normalised = zscore_and_ct(image, inside)
    assert prepared.record.box == tuple((a, b) for a, b in zip(low, high, strict=True))
    assert prepared.record.shape_network == prepared.image.shape[1:] == shape
    for found, channel in zip(prepared.image, normalised, strict=True):
        wanted = skimage_resize(
            channel.astype(np.float64), shape, order=3, mode="edge", anti_aliasing=False
        )
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    scores = [
        skimage_resize(
            (labels == value).astype(float), shape, order=1, mode="edge", anti_aliasing=False
        )
        for value in range(3)
    ]
    wanted_labels = np.argmax(scores, axis=0)
    sure = np.sort(scores, axis=0)[-1] > 0.51
    np.testing.assert_array_equal(prepared.segmentation[sure], wanted_labels[sure])
    assert sure.mean() > 0.9


def test_marked_voxel_keeps_its_place_in_the_world(case):
    """A bright labelled voxel is found where its world position says, after every step."""
    channels, segmentation, affine = case
    channels = np.abs(channels) * 0 + 1.0
    segmentation = segmentation * 0
    place = np.array([11, 4, 7])
    segmentation[tuple(place)] = 2
    channels[0][tuple(place)] = 500.0
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[[1, 2, 0]])
    configuration = make_configuration(
        spacing, use_mask=(False, False), normalization=("none",) * 2
    )
    prepared = run(channels, affine, configuration, segmentation)
    record = prepared.record
    where = np.argwhere(prepared.segmentation == 2)
    assert len(where) == 1
    back = np.empty(3)
    for d in range(3):
        full = where[0][d] + record.box[d][0]
        axis = record.axes[d]
        back[axis] = (channels.shape[1 + axis] - 1 - full) if record.flips[d] else full
    np.testing.assert_array_equal(back, place)
    np.testing.assert_allclose(affine @ [*back, 1], affine @ [*place, 1])
    assert np.unravel_index(prepared.image[0].argmax(), record.shape_network) == tuple(where[0])
    # Network axes are (S, R, A): the image axis closest to superior comes first.
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    closest = [int(np.abs(directions[:, axis]).argmax()) for axis in record.axes]
    assert closest == list(NETWORK_AXES)
    signs = [directions[world, axis] for world, axis in zip(closest, record.axes, strict=True)]
    assert [sign < 0 for sign in signs] == list(record.flips)


def test_all_ways_of_storing_a_case_are_prepared_alike(case):
    channels, segmentation, affine = case
    configuration = make_configuration((1.0, 1.5, 1.0))
    expected = run(channels, affine, configuration, segmentation)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            turned, labels = channels.transpose(0, *(1 + a for a in order)), segmentation
            labels = labels.transpose(order)
            stored = affine[:, [*order, 3]].copy()
            for axis in range(3):
                if flips[axis]:
                    turned, labels = np.flip(turned, 1 + axis), np.flip(labels, axis)
                    stored[:, 3] += stored[:, axis] * (labels.shape[axis] - 1)
                    stored[:, axis] *= -1
            if (order, flips) not in SOME:
                continue
            found = run(turned, stored, configuration, labels)
            np.testing.assert_array_equal(found.image, expected.image)
            np.testing.assert_array_equal(found.segmentation, expected.segmentation)
            np.testing.assert_array_equal(found.outside, expected.outside)


SOME = [
    ((0, 1, 2), (True, False, True)),
    ((2, 0, 1), (False, True, False)),
    ((1, 0, 2), (True, True, True)),
    ((2, 1, 0), (False, False, True)),
]


def test_outside_is_where_neither_image_nor_label_is(case):
    channels, segmentation, affine = case
    segmentation[2, 1, 3] = 2  # in the box's corner
    channels[:, 2:4, 1:4, 3:6] = 0
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[[1, 2, 0]])
    prepared = run(channels, affine, make_configuration(spacing), segmentation)
    record = prepared.record
    image = record.to_network_axes((channels != 0).any(0))
    labels = record.to_network_axes(segmentation)
    box = tuple(slice(a, b) for a, b in record.box)
    expected = ~(image | (labels > 0))[box]
    np.testing.assert_array_equal(prepared.outside, expected)
    assert expected.any()
    np.testing.assert_array_equal(prepared.segmentation, labels[box])
    without = run(
        channels, affine, make_configuration(spacing, use_mask=(False, False)), segmentation
    )
    assert without.outside is None


def test_2d_configuration_does_not_resample_its_slices(case):
    channels, segmentation, affine = case
    prepared = run(channels, affine, make_configuration((1.6, 0.9)), segmentation)
    record = prepared.record
    cropped = record.shape_cropped
    assert record.spacing_network == (record.spacing_cropped[0], 1.6, 0.9)
    assert prepared.image.shape[1] == cropped[0]
    image, spacing = oriented_slowly(channels, affine, NETWORK_AXES)
    expected = tuple(
        round(n * s / t) for n, s, t in zip(cropped[1:], spacing[1:], (1.6, 0.9), strict=True)
    )
    assert prepared.image.shape[2:] == expected
    box = tuple(slice(a, b) for a, b in record.box)
    normalised = (np.clip(image[1][box], -20, 150) - 60.0) / 40.0
    for found, one in zip(prepared.image[1], normalised, strict=True):
        wanted = skimage_resize(
            one.astype(np.float64), expected, order=3, mode="edge", anti_aliasing=False
        )
        assert np.abs(found - wanted).mean() < 0.02


def test_prediction_needs_no_segmentation(case):
    channels, segmentation, affine = case
    configuration = make_configuration((1.0, 1.5, 1.0))
    prepared = run(channels, affine, configuration)
    assert prepared.segmentation is None
    assert prepared.outside is None
    assert prepared.record == run(channels, affine, configuration, segmentation).record


def test_all_zero_image_is_prepared_without_a_warning(case):
    channels, segmentation, affine = case
    prepared = run(channels * 0, affine, make_configuration((1.0, 1.5, 1.0)))
    assert prepared.record.shape_cropped == prepared.record.shape_oriented
    assert np.isfinite(prepared.image).all()
    labelled = run(channels * 0, affine, make_configuration((1.0, 1.5, 1.0)), segmentation)
    assert labelled.segmentation.max() == 2


def test_input_arrays_are_left_alone(case):
    channels, segmentation, affine = case
    before = channels.copy(), segmentation.copy(), affine.copy()
    run(channels, affine, make_configuration((1.0, 1.5, 1.0)), segmentation)
    for array, copy in zip((channels, segmentation, affine), before, strict=True):
        np.testing.assert_array_equal(array, copy)
