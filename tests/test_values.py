"""Which values a label map holds, and other values in their place."""

import numpy as np
import pytest

from medseg import values as module
from medseg.values import distinct_values, places_in, value_counts, values_at

KINDS = {
    "binary mask": ([0, 255], np.uint8),
    "sixteen bits": ([0, 7, 300, 65535], np.uint16),
    "negative": ([-100, 0, 3], np.int16),
    "eight bits, signed": ([-128, -1, 127], np.int8),
    "far apart": ([-2_000_000_000, 0, 5, 2_000_000_000], np.int32),
    "beyond 2 to the 31": ([0, 1000, 4_000_000_000], np.uint32),
    "beyond 2 to the 63": ([2**63, 2**63 + 5, 2**64 - 1], np.uint64),
    "close together beyond 2 to the 63": ([2**64 - 9, 2**64 - 1], np.uint64),
}
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "turned": lambda array: np.ascontiguousarray(array.transpose(1, 2, 0)).transpose(2, 0, 1),
    "window": lambda array: np.pad(array, 2)[2:-2, 2:-2, 2:-2],
    "reversed": lambda array: array[::-1, :, ::-1],
}


@pytest.fixture(params=KINDS)
def listed(request):
    values, kind = KINDS[request.param]
    return values, kind


@pytest.fixture(params=LAYOUTS)
def label_map(request, listed):
    values, kind = listed
    drawn = np.random.default_rng(4).choice(values, size=(5, 7, 3)).astype(kind)
    return LAYOUTS[request.param](drawn)


@pytest.fixture(autouse=True, params=[2**16, 11], ids=["at once", "in parts"])
def _parts(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", request.param)


def test_values_are_counted_like_a_walk_over_voxels(label_map):
    counts = {}
    for value in label_map.reshape(-1).tolist():
        counts[value] = counts.get(value, 0) + 1
    values, numbers = value_counts(label_map)
    assert dict(zip(values.tolist(), numbers.tolist(), strict=True)) == counts
    assert values.tolist() == sorted(counts)
    assert distinct_values(label_map).tolist() == sorted(counts)


def test_places_are_those_of_the_list(listed, label_map):
    rest = [99] if max(listed[0]) < 2**63 else [2**64 - 3]
    values = listed[0][1:] + listed[0][:1] + rest  # neither sorted nor all of them there
    found = places_in(values, label_map, np.dtype(np.uint8))
    assert found.dtype == np.uint8
    expected = [values.index(value) for value in label_map.reshape(-1).tolist()]
    assert found.reshape(-1).tolist() == expected
    back = values_at(np.array(values), found)
    np.testing.assert_array_equal(back, label_map)


def test_the_order_of_memory_is_kept(listed):
    values, kind = listed
    turned = np.asfortranarray(np.random.default_rng(0).choice(values, size=(4, 5, 6)).astype(kind))
    found = places_in(values, turned, np.dtype(np.uint16))
    assert found.flags.f_contiguous
    assert values_at(np.array(values), found).flags.f_contiguous


def test_one_value_that_is_not_listed_gives_none(listed, label_map):
    spoilt = label_map.copy()
    spoilt[4, 6, 2] = 42
    assert places_in(listed[0], spoilt, np.dtype(np.uint8)) is None


def test_two_hundred_and_fifty_six_places_fit_into_a_byte():
    values = [10 * value for value in range(256)]
    array = np.array([values, values[::-1]], np.uint16)
    found = places_in(values, array, np.dtype(np.uint8))
    assert found.tolist() == [list(range(256)), list(range(255, -1, -1))]


def test_no_listed_value_lies_among_those_of_the_array():
    array = np.array([[-9, 100_000], [5, 7]])
    assert places_in([-10, 100_001], array, np.dtype(np.uint8)) is None


def test_nothing_holds_no_value():
    nothing = np.zeros((0, 3), np.int16)
    assert [each.tolist() for each in value_counts(nothing)] == [[], []]
    assert places_in([0], nothing, np.dtype(np.uint8)).shape == (0, 3)
