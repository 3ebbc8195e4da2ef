"""Voxel counts and overlap measures."""

import numpy as np
import pytest

from medseg.metrics.overlap import joint_counts, volume_ml


@pytest.fixture
def maps():
    """Two label maps with shared values, and values in one only."""
    rng = np.random.default_rng(3)
    prediction = rng.choice([0, 1, 2, 5], size=(7, 11, 5)).astype(np.uint8)
    reference = rng.choice([0, 1, 2, 300], size=(7, 11, 5)).astype(np.uint16)
    return prediction, reference, rng.random((7, 11, 5)) < 0.8


def obvious_counts(prediction, reference, values, valid):
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for index in np.ndindex(prediction.shape):
        if not valid[index]:
            continue
        ours, theirs = prediction[index] in values, reference[index] in values
        counts[("t" if ours == theirs else "f") + ("p" if ours else "n")] += 1
    return counts


@pytest.mark.parametrize("values", [(1,), (2, 5), (1, 2, 300), (5,), (300,), (77,)])
@pytest.mark.parametrize("has_valid", [True, False])
@pytest.mark.parametrize("slab", [13, 2**22])
def test_counts_equal_a_loop_over_voxels(maps, values, has_valid, slab, monkeypatch):
    monkeypatch.setattr("medseg.metrics.overlap.SLAB_VOXELS", slab)
    prediction, reference, valid = maps
    overlap = joint_counts(prediction, reference, valid=valid if has_valid else None)
    found = overlap.overlap(values)
    expected = obvious_counts(prediction, reference, values, valid | (not has_valid))
    assert found.true_positives == expected["tp"]
    assert found.false_positives == expected["fp"]
    assert found.false_negatives == expected["fn"]
    assert found.true_negatives == expected["tn"]


def test_counts_do_not_depend_on_memory_layout(maps):
    prediction, reference, valid = maps
    expected = joint_counts(prediction, reference, valid=valid).counts
    turned = [np.asfortranarray(array) for array in maps]
    found = joint_counts(turned[0], turned[1], valid=turned[2])
    np.testing.assert_array_equal(found.counts, expected)


def test_measures_of_a_pinned_example():
    prediction = np.array([[1, 1, 1, 0], [0, 0, 2, 2]], np.uint8)
    reference = np.array([[1, 1, 0, 0], [1, 1, 2, 0]], np.uint8)
    one = joint_counts(prediction, reference).overlap((1,))
    assert (one.dice, one.iou) == (pytest.approx(4 / 7), pytest.approx(2 / 5))
    assert (one.precision, one.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 4))
    assert joint_counts(prediction, reference).overlap((1, 2)).dice == pytest.approx(6 / 10)


def test_measures_are_undefined_exactly_where_the_denominator_is_zero():
    some, none = np.array([1, 0], np.uint8), np.zeros(2, np.uint8)
    both_empty = joint_counts(none, none).overlap((1,))
    assert (both_empty.dice, both_empty.iou) == (None, None)
    assert (both_empty.precision, both_empty.recall) == (None, None)
    missed = joint_counts(none, some).overlap((1,))
    assert (missed.dice, missed.iou, missed.precision, missed.recall) == (0, 0, None, 0)
    invented = joint_counts(some, none).overlap((1,))
    assert (invented.dice, invented.iou, invented.precision, invented.recall) == (0, 0, 0, None)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        joint_counts(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize("others", [(-7, 40), (70_000, 2_000_000_000)])
def test_values_may_be_negative_or_large(maps, others):
    """Labels 0, 1, 2, 5, 300 by other names give the same counts."""
    prediction, reference, valid = maps
    names = {0: 0, 1: others[0], 2: 2, 5: others[1], 300: 300}
    renamed = [np.vectorize(names.get)(each).astype(np.int32) for each in (prediction, reference)]
    expected = joint_counts(prediction, reference, valid=valid)
    found = joint_counts(*renamed, valid=valid)
    for values in ((1,), (2, 5), (1, 300)):
        asked = tuple(names[value] for value in values)
        assert found.overlap(asked) == expected.overlap(values)


def test_volume_of_an_oblique_grid_is_the_product_of_its_spacings():
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 1.9, 3.1])
    assert volume_ml(1000, affine) == pytest.approx(0.7 * 1.9 * 3.1)
