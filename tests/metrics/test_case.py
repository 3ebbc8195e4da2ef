"""All measures of a case, and their statistics over cases."""

import numpy as np
import pytest

from medseg.errors import GeometryError
from medseg.metrics.case import evaluate_case, summarize
from medseg.metrics.surface import hd95_mm, nsd, surface_distances
from medseg.schema.base import read, write
from medseg.schema.metrics import CaseMetrics, Metrics

STRUCTURES = {"whole": (1, 2), "core": (2,), "absent": (7,)}
SPACING = (0.7, 1.9, 3.1)


def oblique_affine():
    turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(SPACING)
    affine[:3, 3] = (11, -7, 3)
    return affine


def nested_balls(centre, shape=(23, 17, 12)):
    grid = np.moveaxis(np.indices(shape), 0, -1) * SPACING
    radius = np.linalg.norm(grid - np.array(centre), axis=-1)
    return ((radius < 7).astype(np.uint8) + (radius < 4)).astype(np.uint8)


@pytest.fixture
def maps():
    reference = nested_balls((8, 15, 18))
    reference[12:15, 3:9] = 3
    return nested_balls((9, 17, 18)), reference


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_values_equal_those_of_the_whole_volume(maps, ignore_label):
    """Counting in one pass and cropping to the structure must change nothing."""
    prediction, reference = maps
    found = evaluate_case(
        prediction,
        reference,
        structures=STRUCTURES,
        affine=oblique_affine(),
        ignore_label=ignore_label,
        nsd_tolerance_mm=2.0,
    )
    valid = reference != (ignore_label or 99)
    for name, values in STRUCTURES.items():
        ours, theirs = np.isin(prediction, values), np.isin(reference, values)
        both = int((ours & theirs & valid).sum())
        total = int((ours & valid).sum() + (theirs & valid).sum())
        distances = surface_distances(ours, theirs, spacing=SPACING, valid=valid)
        one = found[name]
        assert one.dice == (2 * both / total if total else None)
        assert one.true_positives == both
        assert one.volume_prediction_ml == pytest.approx(
            (ours & valid).sum() * np.prod(SPACING) / 1000
        )
        expected = (hd95_mm(distances), nsd(distances, 2.0))
        assert (one.hd95_mm, one.nsd) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert (found["whole"].hd95_mm or 0) > 0
    counts = found["absent"]
    assert counts.true_negatives == valid.sum()


def test_ignored_voxels_change_no_value(maps):
    prediction, reference = maps
    options = {"structures": STRUCTURES, "affine": oblique_affine(), "ignore_label": 3}
    expected = evaluate_case(prediction, reference, **options)
    scribbled = np.where(reference == 3, 2 - prediction, prediction).astype(np.uint8)
    assert (scribbled != prediction).any()
    assert evaluate_case(scribbled, reference, **options) == expected


def test_mirrored_and_transposed_grids_give_the_same_values(maps):
    expected = evaluate_case(*maps, structures=STRUCTURES, affine=np.diag([*SPACING, 1.0]))
    turned = [np.flip(one.transpose(2, 0, 1), 1) for one in maps]
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = SPACING[2], -SPACING[0], SPACING[1], 1
    found = evaluate_case(*turned, structures=STRUCTURES, affine=affine)
    for name in STRUCTURES:
        for field, value in expected[name].model_dump().items():
            assert getattr(found[name], field) == pytest.approx(value), (name, field)


def test_a_single_slice_has_outlines_as_surfaces():
    reference = np.zeros((20, 15, 1), np.uint8)
    reference[4:15, 3:12] = 1
    prediction = np.roll(reference, 2, axis=0)
    found = evaluate_case(
        prediction, reference, structures={"a": (1,)}, affine=np.diag([0.5, 0.8, 9, 1])
    )["a"]
    assert found.hd95_mm == pytest.approx(1.0)
    assert found.nsd is not None
    assert found.nsd == 1


def test_shapes_must_agree():
    with pytest.raises(GeometryError, match=r"\(2, 3, 4\).*\(4, 3, 2\).*share one grid"):
        evaluate_case(
            np.zeros((2, 3, 4), np.uint8),
            np.zeros((4, 3, 2), np.uint8),
            structures={},
            affine=np.eye(4),
        )


def line(*values):
    return np.array(values, np.uint8).reshape(-1, 1, 1)


@pytest.fixture
def three_cases():
    """Structure a has Dice 1, 2/3 and undefined; structure b 0, undefined, undefined."""
    pairs = {
        "z": (line(1, 1, 0, 0), line(1, 1, 0, 2)),
        "y": (line(1, 0, 0, 0), line(1, 1, 0, 0)),
        "x": (line(0, 0, 0, 0), line(0, 0, 0, 0)),
    }
    structures = {"a": (1,), "b": (2,), "c": (3,)}
    cases = {
        name: CaseMetrics(structures=evaluate_case(*pair, structures=structures, affine=np.eye(4)))
        for name, pair in pairs.items()
    }
    return summarize(cases, structures=structures, failed={"w": "broken"}, notes=["a note"])


def test_means_leave_out_undefined_values_and_structures(three_cases):
    dice = three_cases.summary["a"].dice
    assert (dice.n, dice.mean, dice.min, dice.max) == (2, pytest.approx(5 / 6), 2 / 3, 1)
    assert dice.std == pytest.approx(np.std([1, 2 / 3], ddof=1))
    lesser = three_cases.summary["b"]
    assert (lesser.dice.n, lesser.dice.mean, lesser.dice.std) == (1, 0, None)
    assert (lesser.hd95_mm.n, lesser.hd95_mm.mean) == (0, None)
    assert three_cases.summary["c"].dice.mean is None
    assert three_cases.foreground_mean.dice == pytest.approx(5 / 12)


def test_metrics_survive_the_file(three_cases, tmp_path):
    write(tmp_path / "metrics.json", three_cases)
    assert read(Metrics, tmp_path / "metrics.json") == three_cases
    assert list(three_cases.cases) == ["x", "y", "z"]
    assert three_cases.failed == {"w": "broken"}


RENAMED = {
    "a mask and its inverse": {0: 255, 1: 0, 2: 7, 3: 9, 7: 11},
    "negative": {0: -1024, 1: -3, 2: 4, 3: 0, 7: 77},
    "large": {0: 0, 1: 1001, 2: 1_000_000_000, 3: 5, 7: 77},
}


@pytest.mark.parametrize("names", RENAMED.values(), ids=RENAMED)
def test_values_of_labels_are_but_names(maps, names):
    """The measures are those of labels 0 to 3, surfaces too."""
    options = {"affine": oblique_affine(), "nsd_tolerance_mm": 2.0}
    expected = evaluate_case(*maps, structures=STRUCTURES, ignore_label=3, **options)
    renamed = [np.vectorize(names.get)(each).astype(np.int64) for each in maps]
    structures = {
        name: tuple(names[value] for value in values) for name, values in STRUCTURES.items()
    }
    found = evaluate_case(*renamed, structures=structures, ignore_label=names[3], **options)
    assert found == expected
    assert found["core"].hd95_mm > 0


def test_means_go_over_the_cases_in_which_a_structure_was_annotated(maps):
    both = evaluate_case(*maps, structures=STRUCTURES, affine=oblique_affine())
    cases = {
        "a": CaseMetrics(structures=both),
        "b": CaseMetrics(structures={"whole": both["core"]}),
        "c": CaseMetrics(structures={"core": both["core"]}),
    }
    metrics = summarize(cases, structures=STRUCTURES)
    assert {name: one.dice.n for name, one in metrics.summary.items()} == {
        "whole": 2,
        "core": 2,
        "absent": 0,
    }
    whole = (both["whole"].dice + both["core"].dice) / 2
    assert metrics.summary["whole"].dice.mean == pytest.approx(whole)
    assert metrics.foreground_mean.dice == pytest.approx((whole + both["core"].dice) / 2)
