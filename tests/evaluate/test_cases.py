"""Pairing of files, and evaluation of folders of label maps."""

import gzip
import json
import pickle

import nibabel
import numpy as np
import pytest

from medseg.errors import ConfigError, DatasetError, GeometryError
from medseg.evaluate.cases import evaluate_case, evaluate_folder, find_description
from medseg.evaluate.pairs import list_segmentations, pair_files
from medseg.schema.dataset import CaseFiles, DatasetSpec

SHAPE, SPACING = (9, 7, 5), (0.7, 1.9, 3.1)


def affine(shift=0.0):
    turn, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    result = np.eye(4)
    result[:3, :3] = turn @ np.diag(SPACING)
    result[:3, 3] = (11 + shift, -7, 3)
    return result


def labels(seed, values=(0, 0, 1, 2)):
    coarse = np.random.default_rng(seed).choice(values, size=(3, 7, 5)).astype(np.uint8)
    return np.repeat(coarse, 3, axis=0)


def save(path, array, matrix=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine() if matrix is None else matrix), path)


@pytest.fixture
def folders(tmp_path):
    """Three cases in an nnU-Net raw layout, and predictions of them."""
    raw, predictions = tmp_path / "Dataset001_Two", tmp_path / "predictions"
    for number, case in enumerate(("a", "b.1", "c")):
        save(raw / "labelsTr" / f"{case}.nii.gz", labels(number))
        save(predictions / f"{case}.nii.gz", labels(10 + number))
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "file_ending": ".nii.gz",
        "numTraining": 3,
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    return predictions, raw / "labelsTr"


def test_folder_gives_the_values_of_each_case(folders):
    metrics = evaluate_folder(*folders)
    assert list(metrics.cases) == ["a", "b.1", "c"]
    assert metrics.structures == {"one": (1,), "two": (2,)}
    assert (metrics.failed, metrics.notes) == ({}, ())
    expected = evaluate_case(labels(11), labels(1), structures=metrics.structures, affine=affine())
    found = metrics.cases["b.1"]
    assert found.prediction == str(folders[0] / "b.1.nii.gz")
    for name, values in expected.items():
        assert found.structures[name].model_dump() == pytest.approx(values.model_dump())
    means = [np.mean([c.structures[n].dice for c in metrics.cases.values()]) for n in expected]
    assert metrics.foreground_mean.dice == pytest.approx(np.mean(means))
    assert 0 < metrics.foreground_mean.dice < 1


def test_two_files_make_a_pair_whatever_their_names(folders, tmp_path):
    save(tmp_path / "mine.nii", labels(0))
    metrics = evaluate_folder(tmp_path / "mine.nii", folders[1] / "a.nii.gz")
    assert list(metrics.cases) == ["a"]
    assert metrics.foreground_mean.dice == 1


def test_formats_may_differ_between_the_folders(folders, tmp_path):
    for case in ("a", "b.1", "c"):
        save(
            tmp_path / "plain" / f"{case}.nii",
            nibabel.load(folders[0] / f"{case}.nii.gz").get_fdata(),
        )
    assert (
        evaluate_folder(tmp_path / "plain", folders[1]).summary == evaluate_folder(*folders).summary
    )


def test_cases_restrict_the_evaluation(folders):
    (folders[0] / "c.nii.gz").unlink()
    assert list(evaluate_folder(*folders, cases=["b.1", "a"]).cases) == ["a", "b.1"]
    with pytest.raises(DatasetError, match=r"no prediction in .* for 1: c"):
        evaluate_folder(*folders, cases=["a", "c"])


def test_all_missing_files_of_both_sides_are_listed_at_once(folders):
    (folders[0] / "a.nii.gz").unlink()
    (folders[1] / "c.nii.gz").unlink()
    for case in ("x", "y"):
        save(folders[0] / f"{case}.nii.gz", labels(0))
    with pytest.raises(DatasetError) as caught:
        evaluate_folder(*folders)
    message = str(caught.value)
    assert f"no prediction in {folders[0]} for 1: a" in message
    assert f"no reference in {folders[1]} for 3: c, x, y" in message
    assert "Predict the missing cases" in message


def test_a_long_list_of_missing_files_is_cut(folders):
    for number in range(30):
        save(folders[0] / f"more{number:02d}.nii.gz", labels(0))
    with pytest.raises(DatasetError, match=r"for 30: more00.* more19 \.\.\. and 10 more"):
        evaluate_folder(*folders)


def test_maps_hidden_files_and_other_files_are_passed_over(folders):
    save(folders[0] / "a.probabilities.nii", labels(0))
    save(folders[0] / "a.entropy.nii.gz", labels(0))
    for name in ("metrics.json", "notes.txt", "._a.nii.gz"):
        (folders[0] / name).write_text("{}")
    assert list(pair_files(*folders)) == ["a", "b.1", "c"]


def test_two_files_of_one_case_are_refused(folders):
    save(folders[0] / "a.nii", labels(0))
    with pytest.raises(DatasetError, match=r"several files of one case[^$]*a: a\.nii, a\.nii\.gz"):
        evaluate_folder(*folders)


def test_a_header_and_its_data_are_one_image(tmp_path):
    for name in ("a.hdr", "a.img"):
        (tmp_path / name).touch()
    assert list_segmentations(tmp_path) == {"a": tmp_path / "a.hdr"}


def test_folders_without_label_maps_are_refused(folders, tmp_path):
    with pytest.raises(DatasetError, match="no such file or folder"):
        evaluate_folder(tmp_path / "nowhere", folders[1])
    with pytest.raises(DatasetError, match=r"no label map there .*labelsTr: give that"):
        evaluate_folder(folders[0], folders[1].parent)


def test_a_bad_case_is_recorded_and_the_others_go_on(folders):
    save(folders[0] / "a.nii.gz", labels(0), affine(shift=2.0))
    whole = (folders[0] / "b.1.nii.gz").read_bytes()
    (folders[0] / "b.1.nii.gz").write_bytes(whole[: len(whole) // 2])
    metrics = evaluate_folder(*folders)
    assert list(metrics.cases) == ["c"]
    assert sorted(metrics.failed) == ["a", "b.1"]
    assert metrics.failed["a"].startswith(f"{folders[0] / 'a.nii.gz'} does not lie on the grid")
    assert metrics.summary["one"].dice.n == 1


@pytest.mark.parametrize("problem", ["shape", "place"])
def test_grids_that_differ_are_refused(folders, problem):
    array = labels(0)[:, :, :4] if problem == "shape" else labels(0)
    save(folders[0] / "a.nii.gz", array, affine(shift=2.0 if problem == "place" else 0))
    with pytest.raises(GeometryError, match=r"case 'a': .*does not lie on the grid of"):
        evaluate_folder(folders[0] / "a.nii.gz", folders[1] / "a.nii.gz")


@pytest.mark.parametrize("side", [0, 1])
def test_values_the_dataset_does_not_have_are_refused(folders, side):
    save(folders[side] / "a.nii.gz", labels(0, values=(0, 1, 7)))
    failed = evaluate_folder(*folders).failed
    assert list(failed) == ["a"]
    assert "7" in failed["a"]
    assert str(folders[side] / "a.nii.gz") in failed["a"]


def test_without_description_every_value_of_the_references_is_a_structure(folders):
    (folders[1].parent / "dataset.json").unlink()
    save(folders[1] / "c.nii.gz", labels(3, values=(0, 2, 4)))
    save(folders[0] / "a.nii.gz", labels(4, values=(0, 2, 9)))
    metrics = evaluate_folder(*folders)
    assert metrics.structures == {"1": (1,), "2": (2,), "4": (4,)}
    assert metrics.cases["a"].structures["4"].dice is None
    assert metrics.notes == (
        "label 9 is in no reference and was not scored; 1 predictions hold it: a",
    )


def test_without_description_an_unreadable_reference_is_recorded(folders):
    (folders[1].parent / "dataset.json").unlink()
    (folders[1] / "b.1.nii.gz").write_bytes(gzip.compress(b"no image"))
    metrics = evaluate_folder(*folders)
    assert list(metrics.failed) == ["b.1"]
    assert list(metrics.cases) == ["a", "c"]


REGIONS = DatasetSpec(
    name="regions",
    channels=("T1",),
    labels={"background": 0, "whole": (1, 2), "core": 2},
    regions_class_order=(1, 2),
    ignore_label=3,
)


def test_regions_and_the_ignore_label(folders):
    for case in ("a", "b.1", "c"):
        save(folders[1] / f"{case}.nii.gz", labels(5, values=(0, 1, 2, 3)))
    metrics = evaluate_folder(*folders, labels=REGIONS)
    assert metrics.structures == {"whole": (1, 2), "core": (2,)}
    assert metrics.ignore_label == 3
    reference = labels(5, values=(0, 1, 2, 3))
    prediction, valid = labels(10), reference != 3
    ours, theirs = (prediction > 0) & valid, (reference > 0) & valid
    whole = metrics.cases["a"].structures["whole"]
    assert whole.dice == 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    total = whole.true_positives + whole.false_positives
    total += whole.false_negatives + whole.true_negatives
    assert total == valid.sum()


def test_description_is_found_in_or_above_the_folder(folders):
    labels_folder = folders[1]
    assert find_description(labels_folder).labels == {"background": 0, "one": 1, "two": 2}
    assert find_description(labels_folder / "a.nii.gz") == find_description(labels_folder)
    decathlon = {"labels": {"0": "Background", "1": "front", "2": "back"}}
    (labels_folder / "dataset.json").write_text(json.dumps(decathlon))
    assert find_description(labels_folder).labels == {"background": 0, "front": 1, "back": 2}
    (labels_folder / "dataset.json").write_text(REGIONS.model_dump_json())
    assert find_description(labels_folder) == REGIONS
    (labels_folder / "dataset.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object, got a list"):
        evaluate_folder(*folders)


def test_no_description_is_no_error(folders):
    assert find_description(folders[0]) is None


def test_work_can_go_to_other_processes(folders):
    from medseg.evaluate.cases import _Comparison, _ReferenceValues
    from medseg.labels import LabelScheme

    pairs = pair_files(*folders)
    compare = _Comparison(
        pairs=pairs,
        structures={"one": (1,)},
        scheme=LabelScheme.from_spec(REGIONS),
        nsd_tolerance_mm=1.0,
    )
    assert pickle.loads(pickle.dumps(compare))("a") == compare("a")
    values = pickle.loads(pickle.dumps(_ReferenceValues(pairs=pairs)))
    assert values("c") == {0, 1, 2}


ODD_NAMES = {0: 255, 1: -3, 2: 1017}


def renamed(array):
    return np.vectorize(ODD_NAMES.get)(array).astype(np.int16)


@pytest.fixture
def odd_folders(folders):
    """The same three cases with the values 255 (background), -3 and 1017, and described so."""
    for number, case in enumerate(("a", "b.1", "c")):
        save(folders[1] / f"{case}.nii.gz", renamed(labels(number)))
        save(folders[0] / f"{case}.nii.gz", renamed(labels(10 + number)))
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 255, "one": -3, "two": 1017, "ignore": 9},
        "file_ending": ".nii.gz",
    }
    (folders[1].parent / "dataset.json").write_text(json.dumps(description))
    return folders


def test_values_in_files_may_be_any_integers(odd_folders, tmp_path):
    """Two and one score as labels 2 and 1 would, by either kind of description."""
    metrics = evaluate_folder(*odd_folders)
    assert metrics.structures == {"one": (-3,), "two": (1017,)}
    assert metrics.ignore_label == 9
    structures = {"one": (1,), "two": (2,)}
    for number, case in enumerate(("a", "b.1", "c")):
        expected = evaluate_case(
            labels(10 + number), labels(number), structures=structures, affine=affine()
        )
        for name, values in expected.items():
            found = metrics.cases[case].structures[name]
            assert found.model_dump() == pytest.approx(values.model_dump())
    ours = DatasetSpec(
        name="odd",
        channels=("T1",),
        labels={"two": 1017, "one": -3, "background": 255},
        ignore_label=9,
    )
    (odd_folders[1].parent / "dataset.json").write_text(ours.model_dump_json())
    assert evaluate_folder(*odd_folders).cases == metrics.cases


def test_odd_values_without_description_are_structures_of_their_own(odd_folders):
    (odd_folders[1].parent / "dataset.json").unlink()
    assert list(evaluate_folder(*odd_folders).structures) == ["-3", "255", "1017"]


def partial_spec(**annotated):
    return DatasetSpec(
        name="two",
        channels=("T1",),
        labels={"background": 0, "one": 1, "two": 2},
        cases={
            case.replace("_", "."): CaseFiles(
                channels=("x.nii",),
                segmentation=f"labelsTr/{case.replace('_', '.')}.nii.gz",
                annotated_labels=names,
            )
            for case, names in annotated.items()
        },
    )


def test_each_case_is_scored_for_what_was_annotated_in_it(folders):
    save(folders[1] / "a.nii.gz", labels(0, values=(0, 1)))
    save(folders[1] / "b.1.nii.gz", labels(0, values=(0, 2)))
    spec = partial_spec(a=("one",), b_1=("two",), c=None)
    metrics = evaluate_folder(*folders, labels=spec)
    assert metrics.failed == {}
    assert {case: list(one.structures) for case, one in metrics.cases.items()} == {
        "a": ["one"],
        "b.1": ["two"],
        "c": ["one", "two"],
    }
    dice = {case: one.structures for case, one in metrics.cases.items()}
    assert metrics.summary["one"].dice.n == 2
    assert metrics.summary["one"].dice.mean == pytest.approx(
        (dice["a"]["one"].dice + dice["c"]["one"].dice) / 2
    )
    (folders[1].parent / "dataset.json").write_text(spec.model_dump_json())
    assert evaluate_folder(*folders) == metrics


def test_cases_are_found_by_their_reference_where_names_differ(folders):
    spec = partial_spec(a=("one",))
    spec = spec.model_copy(
        update={"source": str(folders[1].parent), "cases": {"patient 7": spec.cases["a"]}}
    )
    save(folders[1] / "a.nii.gz", labels(0, values=(0, 1)))
    metrics = evaluate_folder(*folders, labels=spec)
    assert list(metrics.cases["a"].structures) == ["one"]
    assert list(metrics.cases["c"].structures) == ["one", "two"]


def test_a_reference_that_holds_what_was_not_annotated_is_refused(folders):
    metrics = evaluate_folder(*folders, labels=partial_spec(a=("one",)))
    assert list(metrics.failed) == ["a"]
    assert "holds 2 (two), but the case is said to be annotated only for one" in metrics.failed["a"]


def test_a_manifest_beside_the_references_says_what_was_annotated(folders):
    raw = folders[1].parent
    (raw / "dataset.json").unlink()
    save(folders[1] / "a.nii.gz", labels(0, values=(0, 2)))
    for case in ("a", "b.1", "c"):
        save(raw / "images" / f"{case}.nii.gz", labels(1))
    entries = [
        {"case": case, "T1": f"images/{case}.nii.gz", "segmentation": f"labelsTr/{case}.nii.gz"}
        for case in ("a", "b.1", "c")
    ]
    entries[0]["annotated_labels"] = ["two"]
    manifest = {
        "channels": ["T1"],
        "labels": {"background": 0, "one": 1, "two": 2},
        "cases": entries,
    }
    (raw / "medseg.json").write_text(json.dumps(manifest))
    metrics = evaluate_folder(*folders)
    assert metrics.failed == {}
    assert list(metrics.cases["a"].structures) == ["two"]
    assert metrics.summary["one"].dice.n == 2
