"""Patch k: which case, which place, which voxels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from medseg.data.patches import Annotation, PatchSampler, cut, partial_annotations
from medseg.labels import LabelScheme
from medseg.schema.dataset import CaseFiles, DatasetSpec


@pytest.fixture(scope="module")
def entries(make):
    """Three cases: labels 1 and 3, label 3 alone, and no foreground at all."""
    shape = (9, 14, 11)
    only = np.zeros(shape, np.uint8)
    only[8, 13, 10] = 3
    return {
        "both": make.entry(shape),
        "corner": make.entry(shape, labels=only),
        "empty": make.entry(shape, labels=np.zeros(shape, np.uint8)),
    }


@pytest.fixture
def sampler(entries):
    return PatchSampler(
        entries=entries,
        case_ids=tuple(entries),
        patch_size=(4, 6, 5),
        batch_size=4,
        foreground_fraction=0.5,
        structures=((1,), (3,)),
        seed=7,
    )


def window(array, start, size, fill=0):
    """Return what `cut` returns, the slow way: pad generously, then slice."""
    lead = array.ndim - len(size)
    width = 40
    padded = np.pad(array, [(0, 0)] * lead + [(width, width)] * len(size), constant_values=fill)
    place = tuple(slice(s + width, s + width + n) for s, n in zip(start, size, strict=True))
    return padded[(slice(None),) * lead + place]


def test_windows_are_those_of_padding(make):
    entry = make.entry()
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, size = rng.integers(-15, 20, 3), rng.integers(1, 18, 3)
        for array, fill in ((entry.image, 0), (entry.segmentation, 0), (entry.outside, True)):
            np.testing.assert_array_equal(
                cut(array, start, size, fill), window(array, start, size, fill)
            )


def test_patch_depends_on_seed_and_number_alone(sampler):
    first = [sampler.draw(k) for k in range(12)]
    for k in (11, 3, 7):
        again = replace(sampler).draw(k)
        assert (again.case_id, again.index) == (first[k].case_id, k)
        np.testing.assert_array_equal(again.image, first[k].image)
    others = [replace(sampler, seed=8).draw(k) for k in range(12)]
    pairs = zip(first, others, strict=True)
    assert any(not np.array_equal(a.image, b.image) for a, b in pairs)


def start_of(patch, entry):
    """Return where a patch was cut, from the numbers its voxels carry."""
    inside = np.argwhere(patch.image[0] > 0)[0]
    number = int(patch.image[0][tuple(inside)]) - 1
    return np.array(np.unravel_index(number, entry.shape)) - inside


def test_last_samples_of_a_batch_hold_foreground(sampler, entries):
    """Half of the batch is forced: samples 2 and 3 of 4, unless the case has no foreground."""
    structures = []
    for k in range(400):
        patch = sampler.draw(k)
        if k % 4 < 2 or patch.case_id == "empty":
            continue
        start = start_of(patch, entries[patch.case_id])
        center = start + np.array((4, 6, 5)) // 2
        near = patch.segmentation > 0
        assert near.any()
        if (start > 0).all():  # not held back by a border: the centre itself is foreground
            label = entries[patch.case_id].segmentation[tuple(center)]
            assert label > 0
            structures.append((patch.case_id, int(label)))
    both = [label for case, label in structures if case == "both"]
    assert 0.25 < both.count(1) / len(both) < 0.75  # structures count alike, whatever their size


@pytest.mark.parametrize(
    ("fraction", "batch_size", "forced"),
    [(0.33, 2, [1]), (0.33, 12, [8, 9, 10, 11]), (0.0, 3, []), (1.0, 3, [0, 1, 2])],
)
def test_number_of_forced_samples_is_nnunets(sampler, entries, fraction, batch_size, forced):
    """Sample b is forced unless b < round(batch size x (1 - fraction))."""
    chosen = replace(
        sampler,
        case_ids=("corner",),
        batch_size=batch_size,
        foreground_fraction=fraction,
    )
    found = set()
    for k in range(batch_size * 40):
        start = start_of(chosen.draw(k), entries["corner"])
        if tuple(start + np.array((4, 6, 5)) // 2) != (8, 13, 10):
            found.add(k % batch_size)
    assert sorted(set(range(batch_size)) - found) == forced


def test_free_positions_stay_inside_and_reach_every_border(sampler, entries):
    free = replace(sampler, foreground_fraction=0.0, case_ids=("both",))
    starts = np.array([start_of(free.draw(k), entries["both"]) for k in range(600)])
    np.testing.assert_array_equal(starts.min(0), [0, 0, 0])
    np.testing.assert_array_equal(starts.max(0), [9 - 4, 14 - 6, 11 - 5])


def bounds(length, patch):
    """Return nnU-Net's lowest and highest start: a smaller image lies in the middle."""
    need = max(0, patch - length)
    return -(need // 2), length + need // 2 + need % 2 - patch


def test_smaller_image_lies_in_the_middle_of_the_patch(sampler, entries):
    small = replace(sampler, patch_size=(12, 6, 16), foreground_fraction=0.0, case_ids=("both",))
    starts = np.array([start_of(small.draw(k), entries["both"]) for k in range(300)])
    expected = [bounds(length, size) for length, size in zip((9, 14, 11), (12, 6, 16), strict=True)]
    assert [tuple(pair) for pair in zip(starts.min(0), starts.max(0), strict=True)] == expected
    patch = small.draw(0)
    assert patch.image.shape == (2, 12, 6, 16)
    assert patch.outside[0].all()  # beyond the image counts as outside
    assert not patch.segmentation[0].any()


def test_forced_position_is_held_back_by_the_low_border_only(sampler, entries):
    """As nnU-Net: a voxel at the far corner is centred, so the patch runs over that border."""
    forced = replace(sampler, foreground_fraction=1.0, case_ids=("corner",))
    patch = forced.draw(0)
    np.testing.assert_array_equal(start_of(patch, entries["corner"]), [6, 10, 8])
    assert patch.segmentation[2, 3, 2] == 3
    assert not patch.image[:, 3:].any()


def test_more_is_read_around_the_same_centre(sampler, entries):
    """With margins for augmentation the patch itself does not move."""
    plain = [sampler.draw(k) for k in range(20)]
    wide = replace(sampler, read_size=lambda k: (8, 6, 5 + 2 * (k % 3)))
    for k, patch in enumerate(plain):
        entry = entries[patch.case_id]
        found, margin = wide.draw(k), k % 3
        assert found.image.shape[1:] == (8, 6, 5 + 2 * margin)
        start = start_of(patch, entry) - (2, 0, margin)
        np.testing.assert_array_equal(
            found.image, window(entry.image, start, found.image.shape[1:])
        )
        middle = found.image[:, 2:6, :, margin : margin + 5]
        np.testing.assert_array_equal(middle, patch.image)


def test_2d_patches_are_slices_across_the_first_axis(sampler, entries):
    flat = replace(sampler, patch_size=(6, 5), read_size=lambda k: (10, 5))
    seen = set()
    for k in range(200):
        patch = flat.draw(k)
        assert patch.image.shape == (2, 10, 5)
        assert patch.segmentation.shape == patch.outside.shape == (10, 5)
        numbers = patch.image[0][patch.image[0] > 0].astype(int) - 1
        slices = np.unique(np.unravel_index(numbers, (9, 14, 11))[0])
        assert len(slices) == 1
        seen.add(int(slices[0]))
        if k % 4 >= 2 and patch.case_id != "empty":
            assert patch.segmentation.any()
    assert seen == set(range(9))


def test_regions_are_drawn_through_their_labels(sampler):
    whole = replace(sampler, structures=((1, 3),), foreground_fraction=1.0, case_ids=("both",))
    labels = {int(whole.draw(k).segmentation[2, 3, 2]) for k in range(60)}
    assert {1, 3} <= labels


def test_partial_annotations_are_those_of_cases_in_which_something_is_missing():
    names = {"core": (20, 9), "background": 0, "edge": (5,), "all": (5, 9, 20)}
    annotated = {"a": None, "b": ("core",), "c": ("all", "edge"), "d": ("edge", "core", "all")}
    spec = DatasetSpec(
        name="Dataset001_Parts",
        channels=("T1w",),
        labels=names,
        regions_class_order=(20, 5, 9),
        cases={
            case: CaseFiles(channels=(f"{case}.nii",), annotated_labels=found)
            for case, found in annotated.items()
        },
    )
    assert partial_annotations(spec, LabelScheme.from_spec(spec)) == {
        "b": Annotation(channels=(True, False, False), structures=((3, 2),)),
        "c": Annotation(channels=(False, True, True), structures=((1,), (1, 2, 3))),
    }


def test_what_was_not_annotated_is_not_looked_for(sampler, entries):
    """Label 3 of the case may be part of a larger region; as a structure it is not sought."""
    partial = {"both": Annotation(channels=(True, False), structures=((1,),))}
    forced = replace(sampler, partial=partial, foreground_fraction=1.0)
    sought = {"both": set(), "corner": set()}
    for k in range(200):
        patch = forced.draw(k)
        assert patch.annotated == ((True, False) if patch.case_id == "both" else None)
        start = start_of(patch, entries[patch.case_id])
        if patch.case_id != "empty" and (start > 0).all():
            center = tuple(start + np.array((4, 6, 5)) // 2)
            sought[patch.case_id].add(int(entries[patch.case_id].segmentation[center]))
    assert sought == {"both": {1}, "corner": {3}}


def test_cases_that_are_complete_are_drawn_as_ever(sampler):
    """Those of the others keep their place in the random stream."""
    partial = {"corner": Annotation(channels=(True, False), structures=((1,),))}
    other = replace(sampler, partial=partial)
    for k in range(40):
        ours, theirs = other.draw(k), sampler.draw(k)
        assert ours.case_id == theirs.case_id
        if ours.case_id != "corner":
            np.testing.assert_array_equal(ours.image, theirs.image)
