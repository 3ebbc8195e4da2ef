"""What a patch that is to hold foreground is centred on: cases, structures, lesions, voxels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from medseg.data.patches import Annotation, PatchSampler

SHAPE = (9, 14, 11)
NUM_DRAWS = 3000


def blob(labels, label, start, size):
    labels[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = label


def case_with(make, *blobs):
    """Return a case with blobs (label, start, size)."""
    labels = np.zeros(SHAPE, np.uint8)
    for entry in blobs:
        blob(labels, *entry)
    return make.entry(labels=labels)


@pytest.fixture(scope="module")
def entries(make):
    """Four cases: label 1 is in all but one, label 3 in one, label 2 in two."""
    return {
        "large": case_with(make, (1, (0, 0, 0), (6, 9, 8)), (1, (8, 13, 10), (1, 1, 1))),
        "rare": case_with(make, (1, (0, 0, 0), (2, 2, 2)), (3, (5, 6, 7), (1, 2, 1))),
        "two": case_with(make, (2, (1, 1, 1), (2, 3, 4)), (2, (6, 8, 1), (1, 1, 2))),
        "both": case_with(make, (1, (3, 4, 5), (1, 2, 3)), (2, (4, 4, 5), (1, 2, 3))),
        "empty": case_with(make),
    }


@pytest.fixture
def sampler(entries):
    """Every patch is one voxel, and is to be foreground: patches say what was chosen."""
    return PatchSampler(
        entries=entries,
        case_ids=tuple(entries),
        patch_size=(1, 1, 1),
        batch_size=2,
        foreground_fraction=1.0,
        structures=((1,), (2,), (3,)),
        seed=3,
    )


def drawn(sampler, count=NUM_DRAWS):
    """Return (case, voxel, label) of patches."""
    found = []
    for k in range(count):
        patch = sampler.draw(k)
        voxel = np.unravel_index(int(patch.image[0, 0, 0, 0]) - 1, SHAPE)
        found.append((patch.case_id, tuple(map(int, voxel)), int(patch.segmentation[0, 0, 0])))
    return found


def fits(counts, shares):
    """Return the probability of counts at least as far from shares as these are."""
    assert set(counts) <= set(shares), set(counts) - set(shares)
    keys = sorted(shares, key=str)
    total, whole = sum(counts.values()), sum(shares.values())
    expected = [shares[key] * total / whole for key in keys]
    return stats.chisquare([counts.get(key, 0) for key in keys], expected).pvalue


def by_case(entries):
    """Return the shares of (case, label) if a case is chosen first, then a structure of it."""
    shares = {}
    for case, entry in entries.items():
        present = [label for label in (1, 2, 3) if (entry.segmentation == label).any()]
        shares |= {(case, label): 1 / len(entries) / len(present) for label in present}
    return shares


BY_CLASS = {
    ("large", 1): 1 / 9, ("rare", 1): 1 / 9, ("both", 1): 1 / 9,
    ("two", 2): 1 / 6, ("both", 2): 1 / 6,
    ("rare", 3): 1 / 3,
}  # fmt: skip
"""The shares if a structure is chosen first, then a case that has it."""


def test_from_case_a_case_is_chosen_first(sampler, entries):
    counts = Counter((c, label) for c, _, label in drawn(sampler) if c != "empty")
    assert fits(counts, by_case(entries)) > 0.01
    assert fits(counts, BY_CLASS) < 1e-6


def test_from_class_a_structure_is_chosen_first_then_a_case_that_has_it(sampler, entries):
    counts = Counter((c, label) for c, _, label in drawn(replace(sampler, foreground_from="class")))
    assert fits(counts, BY_CLASS) > 0.01
    assert fits(counts, by_case(entries)) < 1e-6


def test_from_class_every_voxel_of_the_structure_counts_alike(sampler, entries):
    chosen = replace(sampler, foreground_from="class", structures=((1,),), case_ids=("large",))
    counts = Counter(voxel for _, voxel, _ in drawn(chosen))
    voxels = map(tuple, np.argwhere(entries["large"].segmentation == 1).tolist())
    assert fits(counts, dict.fromkeys(voxels, 1)) > 0.01


def test_from_class_only_what_was_annotated_is_sought(sampler):
    """Label 2 of "both" was not annotated: the case has no such structure."""
    partial = {
        "both": Annotation(channels=(True, True, False, True), structures=((1,), (3,))),
        "large": Annotation(channels=(True, False, True, True), structures=((2,), (3,))),
    }
    chosen = replace(sampler, foreground_from="class", partial=partial)
    counts = Counter((c, label) for c, _, label in drawn(chosen))
    shares = {("rare", 1): 1 / 6, ("both", 1): 1 / 6, ("two", 2): 1 / 3, ("rare", 3): 1 / 3}
    assert fits(counts, shares) > 0.01


def test_from_class_a_structure_that_no_case_has_is_left_out(sampler):
    chosen = replace(sampler, foreground_from="class", case_ids=("large", "two", "empty"))
    counts = Counter((c, label) for c, _, label in drawn(chosen, 800))
    assert fits(counts, {("large", 1): 1, ("two", 2): 1}) > 0.01


def test_from_class_without_any_structure_patches_are_anywhere(sampler):
    chosen = replace(sampler, foreground_from="class", case_ids=("empty",))
    counts = Counter(voxel[0] for _, voxel, _ in drawn(chosen, 900))
    assert fits(counts, dict.fromkeys(range(9), 1)) > 0.01


@pytest.mark.parametrize("foreground_from", ["case", "class"])
@pytest.mark.parametrize("unit", ["voxel", "lesion"])
def test_the_other_samples_of_a_batch_are_drawn_as_ever(sampler, foreground_from, unit):
    half = replace(sampler, foreground_fraction=0.5)
    other = replace(half, foreground_from=foreground_from, foreground_unit=unit)
    same = [a == b for a, b in zip(drawn(half, 200), drawn(other, 200), strict=True)]
    assert all(same[::2])
    assert all(same[1::2]) == (foreground_from == "case" and unit == "voxel")


def test_lesions_count_alike_whatever_their_size(sampler, entries):
    """The first case: one part of 432 voxels and one of a single voxel."""
    chosen = replace(sampler, case_ids=("large",))
    alone = (8, 13, 10)
    lesions = Counter(v == alone for _, v, _ in drawn(replace(chosen, foreground_unit="lesion")))
    assert fits(lesions, {True: 1, False: 1}) > 0.01
    voxels = Counter(v == alone for _, v, _ in drawn(chosen))
    assert fits(voxels, {True: 1, False: 432}) > 0.01


def test_voxels_of_a_lesion_count_alike(sampler, entries):
    chosen = replace(sampler, case_ids=("two",), foreground_unit="lesion")
    counts = Counter(voxel for _, voxel, _ in drawn(chosen))
    small = {(6, 8, 1): 1 / 4, (6, 8, 2): 1 / 4}
    large = {tuple(v): 1 / 48 for v in np.argwhere(entries["two"].segmentation == 2)[:24].tolist()}
    assert fits(counts, small | large) > 0.01


def test_labels_that_touch_are_one_lesion_of_a_region(sampler):
    """In "both" labels 1 and 2 touch; as a region they are one part of 12 voxels."""
    chosen = replace(
        sampler, structures=((1, 2),), case_ids=("both", "two"), foreground_unit="lesion"
    )
    found = drawn(replace(chosen, foreground_from="class"))
    counts = Counter((case, voxel[0] >= 5) for case, voxel, _ in found)
    assert fits(counts, {("both", False): 2, ("two", False): 1, ("two", True): 1}) > 0.01
    labels = Counter(label for case, _, label in found if case == "both")
    assert fits(labels, {1: 1, 2: 1}) > 0.01


def test_class_and_lesion_together(sampler):
    chosen = replace(sampler, foreground_from="class", foreground_unit="lesion")
    counts = Counter(
        (case, label, voxel == (8, 13, 10) or voxel[0] == 6) for case, voxel, label in drawn(chosen)
    )
    shares = {(case, label, False): share for (case, label), share in BY_CLASS.items()}
    for case, label in (("large", 1), ("two", 2)):
        shares[case, label, False] /= 2
        shares[case, label, True] = shares[case, label, False]
    assert fits(counts, shares) > 0.01


def test_unknown_lesions_are_refused(sampler, entries):
    cases = {**entries, "rare": replace(entries["rare"], lesions=None)}
    with pytest.raises(ValueError, match=r"lesions of 1 cases are not known: \['rare'\]"):
        replace(sampler, entries=cases, foreground_unit="lesion")
    replace(sampler, entries=cases)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_what_several_processes_cut_is_what_one_cuts(sampler, batch_size):
    whole = replace(sampler, batch_size=batch_size, foreground_fraction=0.4, patch_size=(3, 4, 5))
    shares = [tuple(range(rank, batch_size, 2)) for rank in range(2)]
    several = [replace(whole, positions=positions) for positions in shares]
    for batch in range(20):
        numbers = whole.numbers(batch)
        assert numbers == tuple(range(batch * batch_size, (batch + 1) * batch_size))
        parts = [process.numbers(batch) for process in several]
        assert sorted(k for part in parts for k in part) == list(numbers)
        for process, part in zip(several, parts, strict=True):
            for k in part:
                ours, theirs = process.draw(k), whole.draw(k)
                assert (ours.case_id, ours.index) == (theirs.case_id, k)
                np.testing.assert_array_equal(ours.image, theirs.image)
                np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)


@pytest.mark.parametrize("size", [(3, 4, 5), (20, 4, 5), (4, 5)])
def test_labels_of_the_stage_before_are_cut_at_the_same_place(sampler, entries, size):
    """Beyond the image they are background."""
    numbers = np.arange(1, np.prod(SHAPE) + 1, dtype=np.uint16).reshape(SHAPE)
    before = dict.fromkeys(entries, numbers)
    cascade = replace(sampler, patch_size=size, previous=before, foreground_fraction=0.5)
    plain = replace(cascade, previous=None)
    for k in range(40):
        patch, alone = cascade.draw(k), plain.draw(k)
        assert patch.previous.shape == size
        np.testing.assert_array_equal(patch.previous, patch.image[0])  # voxels say where they are
        np.testing.assert_array_equal(patch.image, alone.image)
        assert alone.previous is None


def test_labels_of_the_stage_before_that_do_not_fit_are_all_named(sampler):
    before = {case: np.zeros(SHAPE, np.uint8) for case in ("large", "two", "empty")}
    before["two"] = before["two"][1:]
    with pytest.raises(ValueError, match="3 cases of a cascade") as caught:
        replace(sampler, previous=before)
    text = str(caught.value)
    assert "case 'two': labels of shape (8, 14, 11), expected (9, 14, 11)" in text
    assert "case 'rare': nothing was found" in text
    assert "case 'both': nothing was found" in text
