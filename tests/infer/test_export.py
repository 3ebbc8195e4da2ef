"""Export: slabs against the whole volume resized by scikit-image, crop, permutation, volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.transform import resize as reference_resize

from medseg.geometry import SpatialRecord
from medseg.infer import export
from medseg.infer.export import (
    probabilities_from_logits,
    reduce_parts,
    segmentation_from_logits,
    volumes_ml,
)
from medseg.infer.parts import Held, Part
from medseg.infer.segment import segment_slab
from medseg.labels import LabelScheme

LABELS = LabelScheme(labels={"background": 0, "left": 1, "right": 2, "both": 3})
ODD = LabelScheme(labels={"right": 1017, "background": 255, "left": -3, "both": 0})
REGIONS = LabelScheme(
    labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3},
    regions_class_order=(1, 2, 3),
)
AFFINE = ((0.0, -0.8, 0.0, 5.0), (1.1, 0.0, 0.0, -7.0), (0.0, 0.0, 2.3, 11.0), (0.0, 0.0, 0.0, 1.0))


def make_record(shape_network, *, spacing_network, spacing_cropped=(2.3, 1.1, 0.8)):
    """Image (I, J, K) = (14, 12, 9); network axes are (K, I, J), two of them reversed."""
    return SpatialRecord(
        shape_image=(14, 12, 9),
        affine_image=AFFINE,
        axes=(2, 0, 1),
        flips=(True, False, True),
        box=((1, 8), (3, 13), (0, 11)),
        spacing_cropped=spacing_cropped,
        shape_network=shape_network,
        spacing_network=spacing_network,
    )


def random_logits(shape, channels, seed=3):
    values = np.random.default_rng(seed).normal(size=(channels, *shape))
    return torch.from_numpy(values.astype(np.float32))


def whole_logits(logits, record, separate):
    """Resize every channel at once; with a separate axis slice by slice, then nearest."""
    resized = []
    for channel in logits.numpy().astype(np.float64):
        if separate is None:
            resized.append(linear(channel, record.shape_cropped))
            continue
        slices = np.moveaxis(channel, separate, 0)
        plane = [n for d, n in enumerate(record.shape_cropped) if d != separate]
        stack = np.stack([linear(entry, plane) for entry in slices])
        length = record.shape_cropped[separate]
        rows = np.floor(len(stack) / length * (np.arange(length) + 0.5)).astype(int)
        resized.append(np.moveaxis(stack[rows], 0, separate))
    return np.stack(resized)


def linear(array, shape):
    if array.shape == tuple(shape):
        return array
    return reference_resize(array, shape, order=1, mode="edge", anti_aliasing=False, clip=True)


def put_back(cropped, record, fill=0):
    """Visit every voxel of the box and look up where it lies in the image."""
    image = np.full((*cropped.shape[:-3], *record.shape_image), fill, dtype=cropped.dtype)
    for index in np.ndindex(*cropped.shape[-3:]):
        place = [0, 0, 0]
        for d, (axis, flip) in enumerate(zip(record.axes, record.flips, strict=True)):
            oriented = index[d] + record.box[d][0]
            length = record.shape_image[axis]
            place[axis] = length - 1 - oriented if flip else oriented
        image[(..., *place)] = cropped[(..., *index)]
    return image


VARIANTS = [
    pytest.param((9, 7, 13), (1.7, 1.6, 0.7), None, id="both-ways"),
    pytest.param((4, 12, 14), (4.0, 0.9, 0.6), 0, id="separate-axis"),
    pytest.param((7, 10, 11), (2.3, 1.1, 0.8), None, id="not-resampled"),
    pytest.param((7, 12, 9), (2.3, 0.9, 1.0), None, id="slices-of-2d"),
]


@pytest.fixture(params=[2**24, 1, 400], ids=["one-slab", "row-by-row", "a-few-rows"])
def _slab_elements(request, monkeypatch):
    monkeypatch.setattr(export, "SLAB_ELEMENTS", request.param)


@pytest.mark.usefixtures("_slab_elements")
@pytest.mark.parametrize(("shape", "spacing", "separate"), VARIANTS)
def test_labels_equal_those_of_the_whole_volume(shape, spacing, separate):
    record = make_record(shape, spacing_network=spacing)
    logits = random_logits(shape, 4)
    expected = whole_logits(logits, record, separate).argmax(axis=0).astype(np.uint8)
    found = segmentation_from_logits(logits, record, LABELS)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, put_back(expected, record))


@pytest.mark.usefixtures("_slab_elements")
@pytest.mark.parametrize(("shape", "spacing", "separate"), VARIANTS)
def test_regions_are_painted_in_their_order(shape, spacing, separate):
    record = make_record(shape, spacing_network=spacing)
    logits = random_logits(shape, 3)
    expected = np.zeros(record.shape_cropped, np.uint8)
    for value, region in zip((1, 2, 3), whole_logits(logits, record, separate), strict=True):
        expected[region > 0] = value
    found = segmentation_from_logits(logits, record, REGIONS)
    np.testing.assert_array_equal(found, put_back(expected, record))


@pytest.mark.parametrize(("shape", "spacing", "separate"), VARIANTS)
def test_probabilities_are_those_of_the_resampled_logits(shape, spacing, separate):
    record = make_record(shape, spacing_network=spacing)
    logits = random_logits(shape, 4)
    powers = np.exp(whole_logits(logits, record, separate))
    expected = put_back(powers / powers.sum(axis=0), record)
    outside = expected.sum(axis=0) == 0
    expected[0, outside] = 1
    found = probabilities_from_logits(logits, record, LABELS)
    assert found.shape == (4, 14, 12, 9)
    assert found.dtype == np.float32
    assert outside.any()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("shape", "spacing", "separate"), VARIANTS)
def test_files_get_their_values_and_the_backgrounds_outside(shape, spacing, separate):
    record = make_record(shape, spacing_network=spacing)
    logits = random_logits(shape, 4)
    best = whole_logits(logits, record, separate).argmax(axis=0)
    expected = put_back(np.array([255, -3, 0, 1017], np.int16)[best], record, fill=255)
    found = segmentation_from_logits(logits, record, ODD)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, expected)
    voxel = 0.8 * 1.1 * 2.3 / 1000
    assert volumes_ml(found, np.array(AFFINE), ODD) == pytest.approx(
        {
            "right": (expected == 1017).sum() * voxel,
            "left": (expected == -3).sum() * voxel,
            "both": (expected == 0).sum() * voxel,
        }
    )


def test_probabilities_of_regions_are_zero_outside():
    record = make_record((7, 10, 11), spacing_network=(2.3, 1.1, 0.8))
    logits = random_logits((7, 10, 11), 3)
    expected = put_back(1 / (1 + np.exp(-logits.numpy().astype(np.float64))), record)
    found = probabilities_from_logits(logits, record, REGIONS)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_logits_of_another_shape_are_refused():
    record = make_record((7, 10, 11), spacing_network=(2.3, 1.1, 0.8))
    with pytest.raises(ValueError, match=r"logits have the shape \(7, 10, 12\)"):
        segmentation_from_logits(random_logits((7, 10, 12), 4), record, LABELS)


class Counted(Held):
    """Notes how many logits are asked for at once, and whether rows come back."""

    def __init__(self, logits, axis):
        super().__init__(logits, axis)
        self.sizes, self.released = [], 0

    def rows(self, start, stop):
        assert start >= self.released, "a row was released too early"
        found = super().rows(start, stop)
        self.sizes.append(found.numel())
        return found

    def release(self, stop):
        self.released = max(self.released, stop)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_memory_does_not_grow_with_the_number_of_classes(monkeypatch, axis):
    monkeypatch.setattr(export, "SLAB_ELEMENTS", 2000)
    sizes = []

    def noted(slab, labels, threshold):
        sizes.append(len(slab.logits) * np.prod(slab.shape_out))
        return segment_slab(slab, labels, threshold)

    monkeypatch.setattr(export, "segment_slab", noted)
    record = make_record((9, 7, 13), spacing_network=(1.7, 1.6, 0.7))
    names = {"background": 0} | {f"label {value}": value for value in range(1, 16)}
    source = Counted(random_logits((9, 7, 13), 16), axis)
    labels = LabelScheme(labels=names)
    found = reduce_parts([Part(source=source, record=record)], labels).segmentation
    assert len(sizes) == record.shape_cropped[axis]
    assert max(sizes) <= 2000
    assert max(source.sizes) <= 16 * 9 * 7 * 13 / min(9, 7, 13) * 2
    assert source.released >= source.shape[axis] - 2
    whole = segmentation_from_logits(random_logits((9, 7, 13), 16), record, labels)
    np.testing.assert_array_equal(found, whole)


def test_volumes_sum_voxels_and_regions():
    segmentation = np.zeros((5, 6, 7), np.uint8)
    segmentation[0, 0, :3] = 1
    segmentation[1, :2, 0] = 2
    segmentation[2, 2, 2] = 3
    affine = np.array(AFFINE)
    voxel = 0.8 * 1.1 * 2.3 / 1000
    assert volumes_ml(segmentation, affine, LABELS) == pytest.approx(
        {"left": 3 * voxel, "right": 2 * voxel, "both": voxel}
    )
    assert volumes_ml(segmentation, affine, REGIONS) == pytest.approx(
        {"whole": 6 * voxel, "core": 3 * voxel, "enhancing": voxel}
    )
