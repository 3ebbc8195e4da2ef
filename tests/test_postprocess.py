"""Stored postprocessing: against a flood fill written out, and what nnU-Net stores, as data."""

from __future__ import annotations

import ast
import itertools
from collections import deque

import numpy as np
import pytest

from medseg.errors import BundleError, ConfigError
from medseg.postprocess import apply, check
from medseg.schema.base import read, validate, write
from medseg.schema.postprocessing import FillHoles, KeepLargest, Postprocessing, RemoveSmall

STRUCTURES = {"liver": (1,), "tumour": (2,), "vein": (7,), "organ": (1, 2), "all": (1, 2, 7)}
VOXEL_MM3 = 0.9 * 1.1 * 1.9
SHAPE = (8, 11, 7)


def random_map(seed, shape=SHAPE, background=0, values=(1, 2, 7)):
    """Return a label map of ragged pieces of every size, smaller ones too."""
    rng = np.random.default_rng(seed)
    array = rng.choice([background, background, *values], size=shape)
    for _ in range(2):  # let neighbours agree, so that pieces grow
        axis = int(rng.integers(len(shape)))
        rolled = np.roll(array, 1, axis)
        taken = rng.random(shape) < 0.5
        array[taken] = rolled[taken]
    return array.astype(np.int16)


def flood(mask, connectivity):
    """Return the pieces of a mask as sets of voxels: breadth first, voxel by voxel."""
    steps = [
        step
        for step in itertools.product((-1, 0, 1), repeat=mask.ndim)
        if 0 < sum(abs(part) for part in step) <= connectivity
    ]
    left = {tuple(place) for place in np.argwhere(mask).tolist()}
    pieces = []
    while left:
        piece, waiting = set(), deque([left.pop()])
        while waiting:
            place = waiting.popleft()
            piece.add(place)
            for step in steps:
                near = tuple(a + b for a, b in zip(place, step, strict=True))
                if near in left:
                    left.remove(near)
                    waiting.append(near)
        pieces.append(piece)
    return pieces


def slow(array, postprocessing, background=0, structures=STRUCTURES):
    """Do every step on the whole array, as its definition says."""
    array = array.copy()
    for step in postprocessing.steps:
        sets = [(e,) if isinstance(e, int) else structures[e] for e in step.structures]
        if step.kind != "fill_holes" and step.together:
            sets = [tuple({value for values in sets for value in values})]
        for values in sets:
            mask = np.isin(array, values)
            if step.kind == "fill_holes":
                fill(array, mask, step, values[0], background)
                continue
            pieces = flood(mask, step.connectivity)
            largest = max((len(piece) for piece in pieces), default=0)
            for piece in pieces:
                volume = len(piece) * VOXEL_MM3
                if step.kind == "remove_small":
                    is_removed = volume / 1000 < step.min_ml
                else:
                    is_removed = len(piece) < largest
                    is_removed &= step.below_mm3 is None or volume < step.below_mm3
                for place in piece if is_removed else ():
                    array[place] = background
    return array


def fill(array, mask, step, value, background):
    for hole in flood(~mask, 1):
        is_open = any(
            at in (0, length - 1)
            for place in hole
            for at, length in zip(place, array.shape, strict=True)
            if length > 1
        )
        is_large = step.max_ml is not None and len(hole) * VOXEL_MM3 / 1000 > step.max_ml
        for place in () if is_open or is_large else hole:
            if array[place] == background:
                array[place] = value


STEPS = {
    "largest by faces": KeepLargest(structures=("liver",), connectivity=1),
    "largest by edges": KeepLargest(structures=("liver",), connectivity=2),
    "largest by corners": KeepLargest(structures=("liver",)),
    "largest of a union": KeepLargest(structures=("liver", "vein"), connectivity=1),
    "largest of each": KeepLargest(structures=("liver", "vein"), together=False, connectivity=1),
    "largest of a region": KeepLargest(structures=("organ",), connectivity=1),
    "by value": KeepLargest(structures=(7, "liver"), connectivity=1, together=False),
    "only small ones": KeepLargest(structures=("liver",), connectivity=1, below_mm3=4.0),
    "small": RemoveSmall(structures=("liver", "tumour"), min_ml=0.006, connectivity=1),
    "all are small": RemoveSmall(structures=("liver",), min_ml=100),
    "holes": FillHoles(structures=("organ", "vein")),
    "small holes": FillHoles(structures=("all",), max_ml=0.004),
}


@pytest.mark.parametrize(("seed", "order"), [(0, "C"), (1, "F"), (2, "C")])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_step_equals_a_flood_fill(step, seed, order):
    array = np.array(random_map(seed), order=order)
    before = array.copy()
    postprocessing = Postprocessing(steps=(step,))
    found = apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3)
    np.testing.assert_array_equal(found, slow(array, postprocessing))
    np.testing.assert_array_equal(array, before)
    assert found.dtype == array.dtype
    assert (found is array) == bool((found == before).all())


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_step_of_the_oracle_changes_something(step):
    """Else the comparison above would say nothing."""
    changed = [
        (slow(random_map(seed), Postprocessing(steps=(step,))) != random_map(seed)).any()
        for seed in range(3)
    ]
    assert any(changed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 12, 15), (11, 1, 14), (12, 10, 1)])
def test_one_slice_is_flat(shape, seed):
    """A hole in a slice is a hole, although it is open across the slice."""
    array = random_map(seed, shape)
    postprocessing = Postprocessing(steps=(FillHoles(structures=("liver", "tumour", "vein")),))
    found = apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3)
    np.testing.assert_array_equal(found, slow(array, postprocessing))
    assert found.shape == shape


def test_steps_follow_each_other():
    """What one step leaves is what the next one sees, and a filled hole widens the first value."""
    array = np.zeros((9, 8, 10), np.uint8)
    array[1:7, 1:7, 1:7] = 2
    array[2:6, 2:6, 2:6] = 0
    array[8, 7, 9] = array[1, 1, 1] = 1
    steps = (
        FillHoles(structures=("organ",)),
        KeepLargest(structures=("liver",)),
        RemoveSmall(structures=("tumour",), min_ml=0.5),
    )
    postprocessing = Postprocessing(steps=steps)
    found = apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3)
    np.testing.assert_array_equal(found, slow(array, postprocessing))
    assert np.unique(found).tolist() == [0, 1]
    assert (found == 1).sum() == 4**3 + 1


def test_equally_large_pieces_all_stay():
    array = np.zeros(SHAPE, np.uint8)
    array[0, 0, :3] = array[5, 5, :3] = array[7, 9, :2] = 1
    postprocessing = Postprocessing(steps=(KeepLargest(structures=("liver",)),))
    found = apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3)
    assert (found == 1).sum() == 6


@pytest.mark.parametrize("values", [(255, -3, 0, 1017), (9, 70000, 100, 3)])
def test_any_values_and_any_background(values):
    background, *others = values
    structures = {"a": (others[0],), "b": (others[1], others[2])}
    array = random_map(5, background=0, values=(1, 2, 3))
    array = np.array(values, dtype=np.int32)[array]
    steps = (
        KeepLargest(structures=("a",), connectivity=1),
        RemoveSmall(structures=("b",), min_ml=0.01, connectivity=1),
    )
    postprocessing = Postprocessing(steps=steps)
    found = apply(array, postprocessing, structures, background, VOXEL_MM3)
    np.testing.assert_array_equal(found, slow(array, postprocessing, background, structures))
    assert (found != array).any()


@pytest.mark.parametrize("value", [0, 7])
def test_nothing_to_do_gives_the_array_itself(value):
    array = np.full(SHAPE, value, np.uint8)
    postprocessing = Postprocessing(steps=tuple(STEPS.values()))
    assert apply(array, Postprocessing(), STRUCTURES, 0, VOXEL_MM3) is array
    assert apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3) is array


def test_a_single_voxel():
    array = np.ones((1, 1, 1), np.uint8)
    postprocessing = Postprocessing(steps=(RemoveSmall(structures=("liver",), min_ml=1),))
    assert apply(array, postprocessing, STRUCTURES, 0, VOXEL_MM3).tolist() == [[[0]]]


def test_unknown_structures_are_all_named():
    steps = (KeepLargest(structures=("livre", 1)), FillHoles(structures=(4, 0)))
    with pytest.raises(BundleError, match="3 problems in the stored postprocessing") as caught:
        check(Postprocessing(steps=steps), STRUCTURES)
    text = str(caught.value)
    assert "steps.0 (keep_largest) names 'livre'; expected one of: liver, tumour" in text
    assert "Did you mean 'liver'?" in text
    assert "steps.1 (fill_holes) names 4" in text
    assert "names 0" in text


class TestSchema:
    def test_what_is_written_is_read(self, tmp_path):
        value = Postprocessing(reason="cross-validation", steps=tuple(STEPS.values()))
        write(tmp_path / "postprocessing.json", value)
        assert read(Postprocessing, tmp_path / "postprocessing.json") == value

    @pytest.mark.parametrize(
        ("step", "match"),
        [
            ({"kind": "keep_largst", "structures": ["a"]}, "'keep_largst'"),
            ({"kind": "keep_largest", "structures": []}, "at least 1"),
            ({"kind": "keep_largest", "structures": ["a", "a"]}, "name each once"),
            ({"kind": "keep_largest", "structures": ["a"], "connectivity": 6}, "1, 2 or 3"),
            ({"kind": "keep_largest", "structures": ["a"], "below_mm3": 0}, "greater than 0"),
            ({"kind": "keep_largest", "structures": [1.5]}, "got 1.5"),
            ({"kind": "remove_small", "structures": ["a"]}, "min_ml"),
            ({"kind": "fill_holes", "structures": ["a"], "connectivity": 1}, "connectivity"),
        ],
    )
    def test_what_means_nothing_is_refused(self, step, match):
        with pytest.raises(ConfigError, match=match):
            validate(Postprocessing, {"steps": [step]}, "postprocessing.json")


def nnunet_v1(array, stored, voxel_mm3):
    """Do what v1 does with its stored file, voxel by voxel; see its `postprocessing.json`."""
    array = array.copy()
    sizes = ast.literal_eval(stored["min_valid_object_sizes"])
    for entry in stored["for_which_classes"]:
        values = tuple(entry) if isinstance(entry, list) else (entry,)
        pieces = flood(np.isin(array, values), 1)
        largest = max((len(piece) for piece in pieces), default=0)
        limit = None if sizes is None else sizes[tuple(entry) if isinstance(entry, list) else entry]
        for piece in pieces:
            if len(piece) == largest or (limit is not None and len(piece) * voxel_mm3 >= limit):
                continue
            for place in piece:
                array[place] = 0
    return array


@pytest.mark.parametrize("sizes", ["None", "{1: 8.0, (1, 2): 14.5, 7: 3.9}"])
@pytest.mark.parametrize("seed", range(3))
def test_what_nnunet_v1_stores_is_a_list_of_steps(sizes, seed):
    stored = {"for_which_classes": [1, [1, 2], 7], "min_valid_object_sizes": sizes}
    limits = ast.literal_eval(sizes) or {}
    entries = [(1,), (1, 2), (7,)]
    steps = tuple(
        KeepLargest(
            structures=values,
            connectivity=1,
            below_mm3=limits.get(values if len(values) > 1 else values[0]),
        )
        for values in entries
    )
    array = random_map(seed)
    expected = nnunet_v1(array, stored, VOXEL_MM3)
    found = apply(array, Postprocessing(steps=steps), STRUCTURES, 0, VOXEL_MM3)
    np.testing.assert_array_equal(found, expected)
    assert (expected != array).any()


@pytest.mark.parametrize("seed", range(3))
def test_what_nnunet_v2_stores_is_a_list_of_steps(seed):
    """A union first, then one label, corners are neighbours, no sizes."""
    array = random_map(seed, (14, 11, 12))
    array[np.random.default_rng(seed).random(array.shape) < 0.8] = 0
    expected = array.copy()
    for values in ((1, 2, 7), (1,)):
        pieces = flood(np.isin(expected, values), 3)
        for piece in pieces:
            for place in piece if len(piece) < max(map(len, pieces)) else ():
                expected[place] = 0
    steps = (KeepLargest(structures=(1, 2, 7)), KeepLargest(structures=("liver",)))
    found = apply(array, Postprocessing(steps=steps), STRUCTURES, 0, VOXEL_MM3)
    np.testing.assert_array_equal(found, expected)
    assert (expected != array).any()
