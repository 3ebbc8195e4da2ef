"""Connected parts: as an image library labels them, each with a voxel, regions through labels."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from medseg.data import lesions as lesions_module
from medseg.data import locations as locations_module
from medseg.data.lesions import find_lesions
from medseg.data.locations import sample_locations
from medseg.data.store import CaseStore

CORNERS = np.ones((3, 3, 3))


def label_maps(count, seed=0):
    """Yield label maps of every density, shapes of one voxel along an axis included."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        shape = rng.integers(1, 13, 3)
        values = np.array([0, 3, 5, 300, 7])[rng.integers(0, 5, shape)]
        yield np.where(rng.random(shape) < rng.random(), values, 0).astype(np.uint16)


def found_in(segmentation, ignore_label=None):
    locations = sample_locations(segmentation, ignore_label)
    labels = [label for label in locations if label > 0]
    return labels, locations, find_lesions(segmentation, labels, locations)


@pytest.mark.parametrize("slab", [1, 150, 1 << 21])
@pytest.mark.parametrize("ignore_label", [None, 7])
def test_parts_are_those_of_an_image_library(monkeypatch, slab, ignore_label):
    """However the map is cut into slabs."""
    monkeypatch.setattr(lesions_module, "_SLAB", slab)
    num_parts = 0
    for segmentation in label_maps(40):
        labels, locations, lesions = found_in(segmentation, ignore_label)
        assert set(labels) == set(np.unique(segmentation).tolist()) - {0, ignore_label}
        numbers = []
        for label in labels:
            expected, count = ndimage.label(segmentation == label, CORNERS)
            voxels = np.concatenate([locations[label], lesions.further[label]])
            pairs = set(
                zip(expected[tuple(voxels.T)].tolist(), lesions.parts[label].tolist(), strict=True)
            )
            assert sorted(theirs for theirs, _ in pairs) == list(range(1, count + 1))
            numbers += [ours for _, ours in pairs]
        assert sorted(numbers) == list(range(len(numbers)))  # no part belongs to two labels
        num_parts += len(numbers)
    assert num_parts > 500


@pytest.mark.parametrize("slab", [1, 150, 1 << 21])
def test_parts_of_a_region_are_those_of_its_labels_together(monkeypatch, slab):
    monkeypatch.setattr(lesions_module, "_SLAB", slab)
    fewer = 0
    for segmentation in label_maps(25, seed=1):
        labels, locations, lesions = found_in(segmentation)
        for region in itertools.chain.from_iterable(
            itertools.combinations(labels, size) for size in range(1, len(labels) + 1)
        ):
            expected, count = ndimage.label(np.isin(segmentation, region), CORNERS)
            groups = lesions.of(region, locations)
            assert len(groups) == count
            ours = [set(expected[tuple(voxels.T)].tolist()) for voxels in groups]
            assert sorted(itertools.chain.from_iterable(ours)) == list(range(1, count + 1))
            assert sum(map(len, groups)) == sum(len(lesions.parts[label]) for label in region)
            fewer += count < sum(len(lesions.of((label,), locations)) for label in region)
    assert fewer > 50


def test_a_label_that_is_not_there_has_no_parts():
    segmentation = np.zeros((4, 5, 6), np.uint8)
    assert found_in(segmentation)[2].of((1, 2), {}) == []
    segmentation[1, 2, 3] = 2
    _, locations, lesions = found_in(segmentation)
    assert lesions.of((1,), locations) == []
    assert [voxels.tolist() for voxels in lesions.of((1, 2), locations)] == [[[1, 2, 3]]]


def specks():
    """Return a large organ, of which few voxels are sampled, and 30 specks of the same label."""
    segmentation = np.zeros((30, 70, 60), np.uint8)
    segmentation[:20, :, :40] = 1
    rng = np.random.default_rng(0)
    for number in range(30):
        i, j = divmod(number, 6)
        size = rng.integers(1, 3, 3)
        place = tuple(
            slice(o, o + n) for o, n in zip((22, 3 + 11 * j, 3 + 9 * i), size, strict=True)
        )
        segmentation[place] = 1
    return segmentation


def test_every_part_has_a_voxel_though_few_are_sampled(monkeypatch):
    """The voxels that are sampled stay what they were; the others come besides."""
    monkeypatch.setattr(locations_module, "_MIN_LOCATIONS", 200)
    segmentation = specks()
    _, locations, lesions = found_in(segmentation)
    expected, count = ndimage.label(segmentation, CORNERS)
    assert count == 31
    sampled = set(expected[tuple(locations[1].T)].tolist())
    assert len(sampled) < 10
    further = expected[tuple(lesions.further[1].T)].tolist()
    assert sorted([*sampled, *further]) == list(range(1, 32))
    assert len(lesions.parts[1]) == len(locations[1]) + len(further)
    again = found_in(segmentation)[2]
    np.testing.assert_array_equal(again.further[1], lesions.further[1])
    np.testing.assert_array_equal(again.parts[1], lesions.parts[1])


def test_a_large_label_map_takes_memory_for_its_surface_only():
    segmentation = np.zeros((60, 300, 300), np.uint8)
    segmentation[5:50, 40:250, 60:280] = 2
    segmentation[20:30, 90:150, 90:170] = 1
    locations = sample_locations(segmentation)
    tracemalloc.start()
    try:
        lesions = find_lesions(segmentation, [1, 2], locations)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * segmentation.nbytes  # an int32 map of parts alone is 4 times as large
    assert lesions.touching.tolist() == [[0, 1]]


def test_the_store_keeps_the_parts(tmp_path, make):
    labels = np.zeros((9, 14, 11), np.uint8)
    labels[1:3, 2:4, 1:3], labels[3, 4, 3], labels[7, 12, 9] = 1, 3, 3
    entry, store = make.entry(labels=labels), CaseStore(tmp_path)
    key = "ab" + "0" * 30
    store.put(
        key,
        image=entry.image,
        segmentation=labels,
        outside=None,
        record=entry.record,
        chunk=(4, 5, 6),
    )
    found = store.open(key)
    for structure, count in (((1,), 1), ((3,), 2), ((1, 3), 2), ((2,), 0)):
        ours = found.lesions.of(structure, found.locations)
        expected = entry.lesions.of(structure, entry.locations)
        assert len(ours) == len(expected) == count
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == np.int32


def test_an_ignored_voxel_connects_nothing(tmp_path, make):
    labels = np.zeros((9, 14, 11), np.uint8)
    labels[4, 5, 2:5], labels[4, 5, 5], labels[4, 5, 6:8] = 1, 2, 1
    store, entry = CaseStore(tmp_path), make.entry(labels=labels)
    for key, ignored, count in (("ab" + "0" * 30, None, 1), ("cd" + "0" * 30, 2, 2)):
        store.put(
            key,
            image=entry.image,
            segmentation=labels,
            outside=None,
            record=entry.record,
            chunk=(4, 5, 6),
            ignore_label=ignored,
        )
        found = store.open(key)
        assert len(found.lesions.of((1, 2), found.locations)) == count
