"""Which cases are held in memory: as many as fit, the others are read where they are sliced."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from medseg.data.cache import held_cases, open_entries
from medseg.data.patches import PatchSampler
from medseg.data.store import CaseStore
from medseg.errors import DatasetError

SHAPES = {"b": (9, 14, 11), "d": (4, 5, 6), "a": (8, 9, 7), "c": (5, 14, 11)}


@pytest.fixture
def stored(tmp_path, make):
    """Return a store, its index and the entries that were put into it."""
    store = CaseStore(tmp_path)
    index = {case: f"{number:02d}" + "0" * 30 for number, case in enumerate(SHAPES)}
    entries = {}
    for case, shape in SHAPES.items():
        labels = np.zeros(shape, np.uint8)
        labels[1:3, 2, 3:5] = 1
        entries[case] = make.entry(shape, seed=len(entries), labels=labels, has_outside=False)
        store.put(
            index[case],
            image=entries[case].image,
            segmentation=labels,
            outside=None,
            record=entries[case].record,
            chunk=(4, 5, 6),
        )
    return store, index, entries


def size_of(case):
    """Return the bytes of a case: two channels of float16, one label map."""
    return 5 * int(np.prod(SHAPES[case]))


def in_memory(entries):
    return {case for case, entry in entries.items() if isinstance(entry.image, np.ndarray)}


@pytest.mark.parametrize(
    ("free", "held"),
    [
        (0, set()),
        (size_of("d"), {"d"}),
        (size_of("d") + size_of("a") - 1, {"d"}),
        (size_of("d") + size_of("a"), {"d", "a"}),
        (sum(map(size_of, SHAPES)) - 1, {"d", "a", "c"}),
        (sum(map(size_of, SHAPES)), {"a", "b", "c", "d"}),
    ],
)
def test_the_smallest_cases_are_held_as_far_as_they_fit(stored, free, held):
    store, index, expected = stored
    found = open_entries(store, index, SHAPES, free_bytes=free)
    assert list(found) == list(SHAPES)
    assert in_memory(found) == held
    for case, entry in found.items():
        np.testing.assert_array_equal(entry.image[:, 1:4, 2:], expected[case].image[:, 1:4, 2:])
        np.testing.assert_array_equal(entry.segmentation[...], expected[case].segmentation)
        assert len(entry.lesions.of((1,), entry.locations)) == 1


def test_no_more_memory_is_taken_than_is_free():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = {str(n): int(size) for n, size in enumerate(rng.integers(1, 60, 9))}
        free = int(rng.integers(0, 300))
        held = held_cases(sizes, free)
        assert sum(sizes[case] for case in held) <= free
        left = sorted(set(sizes) - set(held), key=lambda case: sizes[case])
        if left:  # the next smallest would not fit
            assert sum(sizes[case] for case in [*held, left[0]]) > free
            assert all(sizes[case] <= sizes[left[0]] for case in held)


def test_what_stays_on_disk_is_told(stored, caplog):
    store, index, _ = stored
    with caplog.at_level(logging.INFO):
        open_entries(store, index, SHAPES, free_bytes=10**9)
        assert caplog.messages == []
        open_entries(store, index, SHAPES, free_bytes=size_of("d"))
    assert caplog.messages[0].startswith("1 of 4 preprocessed cases are held in memory")


def test_only_the_cases_asked_for_are_opened(stored):
    store, index, _ = stored
    assert list(open_entries(store, index, ["c", "a"], free_bytes=10**9)) == ["c", "a"]


@pytest.mark.parametrize("free", [0, 10**9])
def test_a_damaged_case_is_named(stored, tmp_path, free):
    store, index, _ = stored
    path = tmp_path / "entries" / index["c"][:2] / index["c"] / "image.b2nd"
    content = path.read_bytes()
    place = content.index(bytes.fromhex("28b52ffd"))  # a block that Zstandard packed
    path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
    with pytest.raises(DatasetError, match=index["c"]):
        open_entries(store, index, SHAPES, free_bytes=free)["c"].image[...]


@pytest.mark.parametrize("size", [(4, 6, 5), (12, 6, 16), (6, 5)])
def test_patches_are_the_same_from_memory_and_from_the_disk(stored, size):
    store, index, _ = stored
    held, left = (
        PatchSampler(
            entries=open_entries(store, index, SHAPES, free_bytes=free),
            case_ids=tuple(SHAPES),
            patch_size=size,
            batch_size=2,
            foreground_fraction=0.5,
            structures=((1,),),
            seed=1,
        )
        for free in (10**9, 0)
    )
    for k in range(30):
        ours, theirs = held.draw(k), left.draw(k)
        assert ours.case_id == theirs.case_id
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
