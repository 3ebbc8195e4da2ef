"""Pooling the folds of a run."""

import json
import shutil

import numpy as np
import pytest

from medseg.errors import ConfigError, DatasetError
from medseg.evaluate.crossval import crossval
from medseg.metrics.case import evaluate_case, summarize
from medseg.schema.base import read, write
from medseg.schema.metrics import CaseMetrics, Metrics

STRUCTURES = {"one": (1,), "two": (2,)}
FOLDS = [("a", "d"), ("b",), ("c", "e", "f")]


def case_metrics(seed):
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, 3, size=(2, 4, 5, 6)).astype(np.uint8)
    scores = evaluate_case(prediction, reference, structures=STRUCTURES, affine=np.eye(4))
    return CaseMetrics(prediction="elsewhere", reference=f"labels/{seed}", structures=scores)


def all_cases():
    names = sorted(case for fold in FOLDS for case in fold)
    return {case: case_metrics(number) for number, case in enumerate(names)}


def write_fold(run, number, cases, **options):
    folder = run / f"fold_{number}" / "validation"
    folder.mkdir(parents=True)
    for case in cases:
        (folder / f"{case}.nii.gz").write_text(f"label map of {case}")
        (folder / f"{case}.probabilities.nii").write_text("probabilities")
    chosen = {case: all_cases()[case] for case in cases}
    write(folder / "metrics.json", summarize(chosen, **{"structures": STRUCTURES, **options}))


@pytest.fixture
def run(tmp_path):
    """Three folds whose cases come in no particular order."""
    run = tmp_path / "Task" / "runs" / "nnunet__2d__default"
    for number, cases in enumerate(FOLDS):
        write_fold(run, number, cases)
    everything = {case for fold in FOLDS for case in fold}
    splits = [{"train": sorted(everything - set(c)), "validation": list(c)} for c in FOLDS]
    (tmp_path / "Task" / "splits.json").write_text(json.dumps(splits))
    return run


def test_pooled_values_are_those_of_all_cases_together(run):
    """A mean over cases, not a mean over folds: the folds differ in size."""
    metrics = crossval(run)
    expected = summarize(all_cases(), structures=STRUCTURES)
    assert metrics.summary == expected.summary
    assert metrics.foreground_mean == expected.foreground_mean
    assert list(metrics.cases) == list("abcdef")
    assert metrics.cases["e"].structures == all_cases()["e"].structures
    assert metrics.cases["e"].reference == "labels/4"
    assert metrics.cases["e"].prediction == str(run / "crossval" / "e.nii.gz")


def test_folder_holds_predictions_and_metrics_and_is_replaced_whole(run):
    (run / "crossval").mkdir()
    (run / "crossval" / "stale.nii.gz").touch()
    metrics = crossval(run)
    names = sorted(path.name for path in (run / "crossval").iterdir())
    assert names == [*(f"{case}.nii.gz" for case in "abcdef"), "metrics.json"]
    assert (run / "crossval" / "c.nii.gz").read_text() == "label map of c"
    assert read(Metrics, run / "crossval" / "metrics.json") == metrics
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert crossval(run) == metrics


def test_missing_folds_are_listed(run):
    (run / "fold_0" / "validation" / "metrics.json").unlink()
    for path in sorted((run / "fold_2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run / "fold_2").rmdir()
    with pytest.raises(DatasetError) as caught:
        crossval(run)
    message = str(caught.value)
    assert "2 of 3 folds are missing" in message
    assert "not trained: fold_2" in message
    assert "without validation: fold_0" in message
    assert not (run / "crossval").exists()


def test_five_folds_are_expected_where_no_splits_are_found(run):
    (run.parent.parent / "splits.json").unlink()
    with pytest.raises(DatasetError, match=r"2 of 5 folds[^$]*not trained: fold_3, fold_4"):
        crossval(run)


def test_folds_are_judged_on_the_cases_they_were_started_with(run):
    """The dataset grew after the training: its splits changed, those of the folds did not."""
    path = run.parent.parent / "splits.json"
    splits = json.loads(path.read_text())
    for number, split in enumerate(splits):
        (run / f"fold_{number}/split.json").write_text(json.dumps(split))
    splits[1]["validation"].append("new")
    path.write_text(json.dumps(splits))
    assert list(crossval(run).cases) == list("abcdef")
    (run / "fold_1/split.json").unlink()
    with pytest.raises(DatasetError, match="fold_1: case new was not validated"):
        crossval(run)


def test_a_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no such run"):
        crossval(tmp_path / "nothing")


def test_cases_that_do_not_add_up_are_listed_at_once(run, tmp_path):
    folder = run / "fold_1" / "validation"
    write(folder / "metrics.json", summarize({"a": all_cases()["a"]}, structures=STRUCTURES))
    (run / "fold_2" / "validation" / "e.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        crossval(run)
    lines = str(caught.value).splitlines()
    for expected in (
        "  fold_1: case b was not validated",
        "  fold_1: case a is not its own",
        "  fold_1: case a is also in fold_0",
        "  fold_1: the prediction of case a is missing",
        "  fold_2: the prediction of case e is missing",
    ):
        assert expected in lines
    assert "--validate-only" in lines[-1]


def test_failed_cases_are_carried_over(run):
    folder = run / "fold_1" / "validation"
    write(folder / "metrics.json", summarize({}, structures=STRUCTURES, failed={"b": "broken"}))
    (folder / "b.nii.gz").unlink()
    metrics = crossval(run)
    assert metrics.failed == {"b": "broken"}
    assert list(metrics.cases) == list("acdef")


@pytest.mark.parametrize(
    ("field", "value"), [("structures", {"one": (1,)}), ("nsd_tolerance_mm", 3.0)]
)
def test_folds_must_be_evaluated_alike(run, field, value):
    path = run / "fold_1" / "validation" / "metrics.json"
    write(path, read(Metrics, path).model_copy(update={field: value}))
    with pytest.raises(ConfigError, match=rf"{field} is .* in fold_0 and .* in fold_1"):
        crossval(run)


def test_nothing_is_left_behind_when_a_copy_fails(run, monkeypatch):
    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", no_space)
    with pytest.raises(OSError, match="no space"):
        crossval(run)
    assert sorted(path.name for path in run.iterdir()) == ["fold_0", "fold_1", "fold_2"]
