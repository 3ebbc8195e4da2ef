"""The whole way of the data, on six small cases: prepare, train, predict, judge."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medseg
from medseg.errors import BundleError, ConfigError, DatasetError, PlanError
from medseg.infer.folder import predict_folder
from medseg.io.read import read_segmentation
from medseg.models.weights import load_weights
from medseg.schema.base import read, read_json
from medseg.schema.metrics import Metrics

RUN = "runs/nnunet__3d_fullres__tiny"
JOURNAL_KEYS = {
    "epoch",
    "iteration",
    "progress",
    "lr",
    "train_loss",
    "validation_loss",
    "patch_dice",
    "mean_patch_dice",
    "patch_voxels",
    "smoothed_patch_dice",
    "seconds",
    "elapsed_seconds",
    "wait_seconds",
    "augment_seconds",
    "forward_seconds",
    "backward_seconds",
    "validate_seconds",
    "skipped_steps",
    "session",
    "steps",
    "full_dice",
    "mean_full_dice",
    "alarms",
}


@pytest.fixture(scope="module")
def trained(prepared, recipe, tmp_path_factory):
    """A workspace with folds 0 and 1 trained, and what `train` returned for them."""
    root = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(prepared / "work", root)
    runs = [medseg.train("4", "3d_fullres", fold, recipe=recipe, workspace=root) for fold in (0, 1)]
    return root / "datasets/Dataset004_Tiny", runs


def weights_of(run_folder, fold="fold_0", name="final"):
    return load_weights(Path(run_folder) / fold / "weights" / f"{name}.safetensors")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


def test_workspace_is_laid_out_as_agreed(trained):
    folder, _ = trained
    expected = ["dataset.json", "fingerprint.json", "splits.json", "plans/nnunet.json"]
    expected += ["store/index/nnunet__2d.json", "store/index/nnunet__3d_fullres.json"]
    expected += [f"{RUN}/recipe.yaml", f"{RUN}/environment.json", f"{RUN}/bundle/bundle.json"]
    for fold in ("fold_0", "fold_1"):
        names = ["run.json", "journal.jsonl", "progress.png", "validation/metrics.json"]
        names += ["weights/final.safetensors", "weights/best.safetensors"]
        names += ["checkpoints/00000006/tensors.safetensors", "checkpoints/00000006/state.json"]
        expected += [f"{RUN}/{fold}/{name}" for name in names]
    assert [name for name in expected if not (folder / name).is_file()] == []


def test_nothing_is_left_behind_and_nothing_is_pickled(trained):
    folder, _ = trained
    names = [path.name for path in folder.rglob("*")]
    assert [name for name in names if name.startswith(".") or name.endswith(".part")] == []
    endings = {Path(name).suffix for name in names} - {""}
    known = {".json", ".jsonl", ".yaml", ".png", ".safetensors", ".b2nd", ".npz", ".gz"}
    assert endings <= known


def test_journal_has_a_row_for_each_epoch(trained):
    folder, _ = trained
    lines = (folder / RUN / "fold_0/journal.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["epoch"], row["iteration"]) for row in rows] == [(0, 3), (1, 6)]
    assert all(set(row) == JOURNAL_KEYS for row in rows)
    assert all(set(row["patch_dice"]) == {"organ", "lesion"} for row in rows)
    run = read_json(folder / RUN / "fold_0/run.json")
    assert (run["iterations"], run["epochs"], run["precision"]) == (6, 2, "float32")


def test_validation_covers_the_fold_at_full_volume(trained, prepared):
    folder, runs = trained
    splits = read_json(folder / "splits.json")
    for number, run in enumerate(runs):
        metrics = run.metrics[f"fold_{number}"]
        written = folder / RUN / f"fold_{number}/validation"
        assert sorted(metrics.cases) == splits[number]["validation"]
        assert read(Metrics, written / "metrics.json") == metrics
        for case in metrics.cases:
            reference = prepared / f"Dataset004_Tiny/labelsTr/{case}.nii.gz"
            found, wanted = (
                read_segmentation(written / f"{case}.nii.gz"),
                read_segmentation(reference),
            )
            assert found.grid.disagreement(wanted.grid) is None


def test_ensemble_of_both_folds_keeps_each_input_geometry(trained, prepared, tmp_path):
    _, runs = trained
    model = medseg.load(runs[1].path, device="cpu")
    assert model.folds == ("fold_0", "fold_1")
    images = prepared / "Dataset004_Tiny/imagesTr"
    rows = predict_folder(model, [images], tmp_path / "out", tta="none")
    assert [row.status for row in rows] == ["done"] * 6
    for row in rows:
        image = nib.load(images / f"{row.case}_0000.nii.gz")
        output = nib.load(tmp_path / "out" / row.file)
        assert output.shape == image.shape
        np.testing.assert_allclose(output.affine, image.affine, atol=1e-6)
        for field in ("qform_code", "sform_code", "xyzt_units"):
            assert output.header[field] == image.header[field]
        with gzip.open(tmp_path / "out" / row.file) as file:
            stored = nib.Nifti1Header(file.read(348), check=False)
        assert (float(stored["scl_slope"]), float(stored["scl_inter"])) == (1.0, 0.0)
        assert output.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(output.dataobj))) <= {0, 1, 2}


def test_predictions_can_be_evaluated(trained, prepared, tmp_path):
    folder, runs = trained
    labels = prepared / "Dataset004_Tiny/labelsTr"
    pred, ref = tmp_path / "pred", tmp_path / "labelsTr"
    pred.mkdir()
    ref.mkdir()
    shutil.copy(prepared / "Dataset004_Tiny/dataset.json", tmp_path)
    for path in (folder / RUN / "fold_0/validation").glob("*.nii.gz"):
        shutil.copy(path, pred)
        shutil.copy(labels / path.name, ref)
    metrics = medseg.evaluate(pred, ref, output=tmp_path / "metrics.json")
    assert metrics.summary == runs[0].metrics["fold_0"].summary
    assert read(Metrics, tmp_path / "metrics.json") == metrics


def test_crossval_names_the_folds_that_are_missing(trained, recipe):
    folder, _ = trained
    with pytest.raises(DatasetError, match="3 of 5 folds are missing") as caught:
        medseg.crossval("4", "3d_fullres", recipe=recipe, workspace=folder.parent.parent)
    assert "not trained: fold_2, fold_3, fold_4" in str(caught.value)


def test_finished_fold_is_left_alone(trained, recipe, datasets):
    folder, runs = trained
    before = (folder / RUN / "fold_0/weights/final.safetensors").stat().st_mtime_ns
    again = medseg.train("4", "3d_fullres", 0, recipe=recipe, workspace=folder.parent.parent)
    assert (folder / RUN / "fold_0/weights/final.safetensors").stat().st_mtime_ns == before
    assert again.metrics == {"fold_0": runs[0].metrics["fold_0"]}


def test_validate_only_judges_the_weights_that_are_there(trained, recipe):
    folder, runs = trained
    (folder / RUN / "fold_1/validation/metrics.json").unlink()
    run = medseg.train(
        "4", "3d_fullres", 1, recipe=recipe, validate_only=True, workspace=folder.parent.parent
    )
    assert run.metrics["fold_1"] == runs[1].metrics["fold_1"]
    assert (folder / RUN / "fold_1/validation/metrics.json").is_file()


def test_another_recipe_under_the_same_name_is_refused(trained, recipe):
    folder, _ = trained
    options = {"recipe": recipe, "workspace": folder.parent.parent, "restart": True}
    with pytest.raises(ConfigError, match="another recipe") as caught:
        medseg.train("4", "3d_fullres", 0, set={"optimizer.lr": 0.5}, **options)
    assert "was lr: 0.003, now lr: 0.5" in str(caught.value)
    assert "--name" in str(caught.value)
    assert weights_of(folder / RUN)  # --restart deleted nothing


def test_restart_trains_anew_and_gives_the_same_numbers(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "epochs": 1}
    run = medseg.train("4", "3d_fullres", 2, **options)
    path = run.path / "fold_2/weights/final.safetensors"
    first, before = weights_of(run.path, "fold_2"), path.stat().st_mtime_ns
    medseg.train("4", "3d_fullres", 2, restart=True, **options)
    assert path.stat().st_mtime_ns > before
    assert_same_tensors(weights_of(run.path, "fold_2"), first)


def test_every_fold_then_crossval_pools_every_case(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "name": "short"}
    run = medseg.train("4", "3d_fullres", "cv", iterations=1, **options)
    assert list(run.metrics) == [f"fold_{number}" for number in range(5)]
    pooled = medseg.crossval("4", "3d_fullres", **options)
    assert sorted(pooled.cases) == [f"case_{number}" for number in range(1, 7)]
    dice = [one.structures["organ"].dice for one in pooled.cases.values()]
    assert pooled.summary["organ"].dice.mean == pytest.approx(np.mean(dice))
    assert len(list((run.path / "crossval").glob("*.nii.gz"))) == 6


def test_fold_all_learns_from_every_case_and_has_no_validation(workspace, recipe, prepared):
    run = medseg.train("4", "3d_fullres", "all", recipe=recipe, workspace=workspace, iterations=1)
    assert run.metrics == {}
    assert not (run.path / "fold_0").exists()
    model = medseg.load(run.bundle, device="cpu")
    assert model.folds == ("all",)
    images = prepared / "Dataset004_Tiny/imagesTr"
    result = model.predict([images / f"case_1_{channel:04d}.nii.gz" for channel in (0, 1)])
    assert result.segmentation.shape == (21, 23, 16)
    assert np.unique(result.segmentation).max() <= 2


def test_2d_configuration(workspace, recipe):
    run = medseg.train("4", "2d", 0, recipe=recipe, workspace=workspace, iterations=2)
    splits = read_json(workspace / "datasets/Dataset004_Tiny/splits.json")
    assert sorted(run.metrics["fold_0"].cases) == sorted(splits[0]["validation"])
    assert len(run.metrics["fold_0"].cases) == 2
    assert not run.metrics["fold_0"].failed


def test_regions_and_ignore_label(tmp_path, recipe, datasets):
    """Nested regions, a class order that is not the labels' own, and unlabelled slices."""

    def unlabelled(number, segmentation):
        segmentation[:, :, :3] = 3
        return segmentation

    raw = datasets.write(
        tmp_path / "Dataset005_Regions",
        num_cases=4,
        labels={"background": 0, "whole": [1, 2], "lesion": 2, "ignore": 3},
        description={"regions_class_order": [1, 2]},
        relabel=unlabelled,
    )
    options = {"workspace": tmp_path / "work"}
    medseg.plan_and_preprocess(raw, configurations=["3d_fullres"], workers=1, **options)
    run = medseg.train(raw, "3d_fullres", 0, recipe=recipe, iterations=4, **options)
    metrics = run.metrics["fold_0"]
    assert metrics.structures == {"whole": (1, 2), "lesion": (2,)}
    assert metrics.ignore_label == 3
    manifest = read_json(run.bundle / "bundle.json")
    assert manifest["semantics"]["activation"] == "sigmoid"
    case = next(iter(metrics.cases))
    voxels = read_segmentation(raw / f"labelsTr/{case}.nii.gz").array.size
    counted = metrics.cases[case].structures["whole"]
    total = counted.true_positives + counted.false_positives
    total += counted.false_negatives + counted.true_negatives
    shape = read_segmentation(raw / f"labelsTr/{case}.nii.gz").array.shape
    assert total == voxels - 3 * shape[0] * shape[1]
    prediction = read_segmentation(run.path / f"fold_0/validation/{case}.nii.gz").array
    assert set(np.unique(prediction)) <= {0, 1, 2}


def test_budget_is_respected(workspace, recipe):
    """The schedule, 1000 epochs long by its recipe, is fitted to end within the time given."""
    run = medseg.train(
        "4",
        "3d_fullres",
        0,
        recipe=recipe,
        set=["epochs=1000", "validation_iterations=0"],
        budget="4s",
        workspace=workspace,
    )
    record = read_json(run.path / "fold_0/run.json")
    assert record["stretches"][0]["budget_seconds"] == 4.0
    assert 2.0 < record["seconds_to_last_step"] < 5.5
    rows = [
        json.loads(line) for line in (run.path / "fold_0/journal.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["progress"] == 1.0
    assert rows[-1]["iteration"] == record["iterations"] > 3


def test_preprocessed_cases_are_used_again(workspace, prepared):
    store = workspace / "datasets/Dataset004_Tiny/store"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("entry.json")}
    medseg.plan_and_preprocess(
        prepared / "Dataset004_Tiny",
        configurations=["3d_fullres"],
        workspace=workspace,
        workers=1,
    )
    after = {path: path.stat().st_mtime_ns for path in store.rglob("entry.json")}
    assert len(before) == 6  # slices lie 1.9 mm apart in all cases: 2d and 3d share the entries
    assert after == before


def test_changed_image_is_preprocessed_again(tmp_path, datasets):
    raw = datasets.write(tmp_path / "Dataset006_Few", num_cases=2)
    options = {"configurations": ["3d_fullres"], "workspace": tmp_path / "work", "workers": 1}
    medseg.plan_and_preprocess(raw, **options)
    index = tmp_path / "work/datasets/Dataset006_Few/store/index/nnunet__3d_fullres.json"
    before = read_json(index)["entries"]
    shutil.copy(raw / "imagesTr/case_1_0000.nii.gz", raw / "imagesTr/case_1_0001.nii.gz")
    medseg.plan_and_preprocess(raw, **options)
    after = read_json(index)["entries"]
    assert [case for case in before if after[case] != before[case]] == ["case_1"]


def test_workspace_refuses_another_dataset_of_the_same_name(prepared, workspace, tmp_path):
    other = shutil.copytree(prepared / "Dataset004_Tiny", tmp_path / "b/Dataset004_Tiny")
    with pytest.raises(DatasetError, match="already holds a dataset named") as caught:
        medseg.plan_and_preprocess(other, workspace=workspace)
    assert "--workspace" in str(caught.value)


def test_cascade_and_missing_weights_are_refused(workspace, recipe):
    with pytest.raises(PlanError, match="expected one of: 2d, 3d_fullres"):
        medseg.train("4", "3d_lowres", 0, recipe=recipe, workspace=workspace)
    with pytest.raises(BundleError, match="no such run"):
        medseg.train("4", "2d", 0, recipe=recipe, workspace=workspace, validate_only=True)


def test_training_on_cases_of_other_plans_is_refused(workspace, recipe):
    """Plans changed after preprocessing must not train on what was made from the old ones."""
    from medseg.api import prepare

    prepare.plan("4", target_spacing=(1.4, 1.6, 2.4), replan=True, workspace=workspace)
    with pytest.raises(DatasetError, match="preprocessed for other plans"):
        medseg.train("4", "3d_fullres", 0, recipe=recipe, workspace=workspace, iterations=1)


def test_folds_of_one_run_share_their_plans(workspace, recipe):
    from medseg.api import prepare

    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    medseg.train("4", "3d_fullres", 0, **options)
    prepare.plan("4", target_spacing=(1.4, 1.6, 2.4), replan=True, workspace=workspace)
    prepare.preprocess("4", configurations=["3d_fullres"], workspace=workspace, workers=1)
    with pytest.raises(ConfigError, match=r"started with another plans\.json"):
        medseg.train("4", "3d_fullres", 1, **options)


def test_prediction_mirrors_what_training_mirrored(workspace, recipe):
    """Without augmentation there is no mirroring in training, so none in prediction."""
    run = medseg.train(
        "4", "3d_fullres", 0, recipe=recipe, workspace=workspace, iterations=1,
        name="bare", set={"augmentation.backend": "none"},
    )  # fmt: skip
    assert read_json(run.bundle / "bundle.json")["semantics"]["mirror_axes"] == []


def test_started_fold_keeps_its_length_and_seed(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace}
    run = medseg.train("4", "3d_fullres", 0, iterations=2, seed=3, **options)
    before = read_json(run.path / "fold_0/run.json")
    assert (before["seed"], before["iterations"]) == (3, 2)
    assert before["stretches"] == [
        {"planned_iterations": 2, "budget_seconds": None, "first_iteration": 0}
    ]
    shutil.rmtree(run.path / "fold_0/weights")
    for other in ({"seed": 4}, {"iterations": 5}, {"budget": "3s"}):
        with pytest.raises(ConfigError, match="this fold was started otherwise"):
            medseg.train("4", "3d_fullres", 0, **options, **other)
    medseg.train("4", "3d_fullres", 0, **options)
    assert read_json(run.path / "fold_0/run.json") == before


def test_finished_fold_is_not_validated_again(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    run = medseg.train("4", "3d_fullres", 0, **options)
    file = run.path / "fold_0/validation/metrics.json"
    before = file.stat().st_mtime_ns
    again = medseg.train("4", "3d_fullres", 0, **options)
    assert file.stat().st_mtime_ns == before
    assert again.metrics == run.metrics


def test_best_weights_predict(workspace, recipe, prepared):
    run = medseg.train("4", "3d_fullres", 0, recipe=recipe, workspace=workspace, iterations=3)
    images = prepared / "Dataset004_Tiny/imagesTr"
    case = [images / f"case_1_{channel:04d}.nii.gz" for channel in (0, 1)]
    result = medseg.load(run.bundle, device="cpu", checkpoint="best").predict(case)
    assert result.segmentation.shape == (21, 23, 16)


def test_inference_tile_is_the_training_patch(workspace, recipe):
    """A smaller patch is a smaller tile too: instance norm must see what it was trained on."""
    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    whole = medseg.train("4", "3d_fullres", 0, **options)
    part = medseg.train(
        "4", "3d_fullres", 0, name="part", set={"sampling.patch_fraction": 0.5}, **options
    )
    sizes = [
        medseg.load(run.bundle, device="cpu").bundle.configuration.patch_size
        for run in (whole, part)
    ]
    strides = medseg.load(whole.bundle, device="cpu").bundle.configuration.architecture.strides
    divisors = np.prod(strides, axis=0)
    assert (np.array(sizes[1]) % divisors == 0).all()
    assert np.prod(sizes[1]) < np.prod(sizes[0])
