"""What every option of `medseg predict` does, looked at in the files it writes."""

from __future__ import annotations

import csv
import json
import shutil
import weakref

import nibabel as nib
import numpy as np
import pytest

from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.cli.main import run
from medseg.infer.case_files import FileMaps
from medseg.infer.folder import predict_folder
from medseg.infer.loading import load
from medseg.schema.postprocessing import KeepLargest, Postprocessing
from tests.cli.conftest import Ran
from tests.infer.conftest import (
    Make,
    make_bundle,
    make_channels,
    make_oblique,
    make_plans,
    make_spec,
    write_case,
)
from tests.infer.test_cascade import Two
from tests.io.test_dicom import write_series

SHAPES = {"anna": (19, 15, 11), "bert": (14, 12, 10), "cora": (11, 17, 9)}
HALF_STEP = 0.5 / 65535
"""What a stored share may be off."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("options") / "bundle").folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    plans = make_plans(spacing=(3.0, 1.7, 1.4), patch_size=(8, 12, 16), network_axes=(1, 2, 0))
    return make_bundle(tmp_path_factory.mktemp("options") / "other", plans=plans, folds=1).folder


@pytest.fixture(scope="module")
def model(bundle):
    return load(bundle, device="cpu", mode="exact")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (case, shape) in enumerate(SHAPES.items()):
        write_case(folder, case, make_channels(shape, seed=number), make_oblique())
    return folder


@pytest.fixture
def predict(capsys, bundle, tmp_path):
    """Run the command on the CPU, in float32 and without mirroring; the results lie in `out`."""

    def call(*arguments, models=(bundle,), options=("--tta", "none", "--exact")):
        capsys.readouterr()
        command = ["predict", "-o", tmp_path / "out", "--device", "cpu", *options, *arguments]
        for path in models:
            command += ["-m", path]
        status = run([str(word) for word in command])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return call


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def paths(images, case):
    return sorted(images.glob(f"{case}_*.nii.gz"))


def labels_of(path):
    return np.asarray(nib.load(path).dataobj)


def summary(out, name="summary"):
    return json.loads((out / f"{name}.json").read_text())["cases"]


def segmentations(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.nii.gz"))}


def test_parts_together_hold_every_case_once(predict, images, out):
    rows = []
    for part in (1, 2, 3):
        ran = predict("-i", images, "--parts", f"{part}/3")
        assert ran.status == 0, ran.err
        assert (out / f"summary_{part}_of_3.csv").is_file()
        rows.append([row["case"] for row in summary(out, f"summary_{part}_of_3")])
    assert rows == [["anna"], ["bert"], ["cora"]]
    assert list(segmentations(out)) == [f"{case}.nii.gz" for case in SHAPES]
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "1/0", "-1/3", "a/b", "1/2/3"])
def test_parts_that_make_no_sense_are_refused(predict, images, out, part):
    ran = predict("-i", images, "--parts", part)
    assert ran.status == 2
    assert f"parts is '{part}'" in ran.err
    assert not out.exists()


def test_a_part_without_cases_is_no_error(predict, images, out):
    ran = predict("-i", images, "--parts", "5/5")
    assert (ran.status, summary(out, "summary_5_of_5")) == (0, [])


class TestExistingOutputs:
    def test_they_are_left_and_their_volumes_told(self, predict, images, out):
        assert predict("-i", images).status == 0
        before, rows = segmentations(out), summary(out)
        marked = out / "bert.nii.gz"
        marked.write_bytes(b"corrected by hand")
        (out / "cora.nii.gz").unlink()
        ran = predict("-i", images)
        assert ran.status == 0, ran.err
        assert "1 done, 2 skipped" in ran.out
        assert marked.read_bytes() == b"corrected by hand"
        assert (out / "cora.nii.gz").read_bytes() == before["cora.nii.gz"]
        again = summary(out)
        assert [row["status"] for row in again] == ["skipped", "skipped", "done"]
        for row, first in zip(again, rows, strict=True):
            assert row["volumes_ml"] == first["volumes_ml"]
            assert sum(row["volumes_ml"].values()) > 0

    def test_overwrite_replaces_them(self, predict, images, out):
        assert predict("-i", images).status == 0
        before = segmentations(out)
        for path in out.glob("*.nii.gz"):
            path.write_bytes(b"old")
        ran = predict("-i", images, "--overwrite")
        assert (ran.status, ran.out.count("skipped")) == (0, 0)
        assert segmentations(out) == before

    def test_those_of_another_model_are_named(self, predict, images, other, out, caplog):
        assert predict("-i", images).status == 0
        before = segmentations(out)
        caplog.clear()
        ran = predict("-i", images, models=[other])
        assert ran.status == 0
        assert "3 cases: has an output of another model and folds" in " ".join(ran.out.split())
        assert segmentations(out) == before
        words = "has an output of another model and folds; --overwrite replaces it"
        assert [row["message"] for row in summary(out)] == [words] * 3

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            (("--folds", "0"), "folds"),
            (("--tta", "flips"), "tta"),
            (("--step", "0.3"), "step"),
            (("--checkpoint", "best"), "checkpoint"),
            (("--folds", "0", "--step", "0.3"), "folds and step"),
        ],
    )
    def test_those_of_other_settings_are_named(self, predict, images, out, options, what):
        assert predict("-i", images).status == 0
        assert predict("-i", images).status == 0
        assert {row["message"] for row in summary(out)} == {"has an output"}
        ran = predict("-i", images, *options)
        words = f"has an output of another {what}; --overwrite replaces it"
        assert {row["message"] for row in summary(out)} == {words}
        assert f"3 cases: {words}" in " ".join(ran.out.split())

    def test_other_weights_of_models_are_other_settings(self, predict, images, out, bundle, other):
        both = [bundle, other]
        assert predict("-i", images, "--weights", "3,1", models=both).status == 0
        report = json.loads((out / "anna.json").read_text())["provenance"]
        assert report["weights"] == [0.75, 0.25]
        assert len(report["bundles"]) == 2
        assert predict("-i", images, models=both).status == 0
        assert all("of another weights" in row["message"] for row in summary(out))

    def test_one_that_was_changed_since_is_named_and_kept(self, predict, images, out):
        """It may be a correction by hand."""
        assert predict("-i", images).status == 0
        (out / "anna.nii.gz").write_bytes(b"corrected")
        assert predict("-i", images).status == 0
        messages = {row["case"]: row["message"] for row in summary(out)}
        assert "that was changed since" in messages["anna"]
        assert (out / "anna.nii.gz").read_bytes() == b"corrected"

    def test_what_they_lack_is_named(self, predict, images, out):
        assert predict("-i", images).status == 0
        assert predict("-i", images, "--save", "entropy").status == 0
        assert all("without entropy" in row["message"] for row in summary(out))
        (out / "anna.json").unlink()
        assert predict("-i", images).status == 0
        assert "without a report" in summary(out)[0]["message"]


def test_maps_are_those_of_python_on_the_grid_of_the_image(predict, images, model, out):
    kinds = ("probabilities", "entropy", "disagreement")
    ran = predict("-i", images, "--save", ", ".join(kinds))
    assert ran.status == 0, ran.err
    for case in SHAPES:
        expected = model.predict(paths(images, case), **dict.fromkeys(kinds, True), tta="none")
        assert 0 < expected.disagreement.mean() < 1
        np.testing.assert_array_equal(labels_of(out / f"{case}.nii.gz"), expected.segmentation)
        endings = (".probabilities.nii", ".entropy.nii.gz", ".disagreement.nii.gz")
        for kind, ending in zip(kinds, endings, strict=True):
            found = nib.load(out / f"{case}{ending}")
            wanted = getattr(expected, kind)
            wanted = np.moveaxis(wanted, 0, -1) if wanted.ndim == 4 else wanted
            np.testing.assert_allclose(found.get_fdata(), wanted, atol=HALF_STEP + 1e-6)
            np.testing.assert_allclose(found.affine, make_oblique(), atol=1e-4)
        files = json.loads((out / f"{case}.json").read_text())["files"]
        assert sorted(files) == sorted(["segmentation", *kinds])
        assert all((out / name).is_file() for name in files.values())


def test_maps_that_are_written_leave_the_memory(model, images, out, monkeypatch):
    """However many cases a folder holds: those in work are the only ones in memory."""
    made, held = weakref.WeakSet(), []
    original = FileMaps.__init__

    def noted(self, *rest, **options):
        made.add(self)
        original(self, *rest, **options)

    monkeypatch.setattr(FileMaps, "__init__", noted)
    cases = list(images.iterdir())
    for number in range(5):
        for path in paths(images, "anna"):
            copied = out.parent / path.name.replace("anna", f"fred{number}")
            cases.append(shutil.copy(path, copied))
    rows = predict_folder(
        model, cases, out, tta="none", save=["entropy"],
        progress=lambda row, total: held.append(len(made)),
    )  # fmt: skip
    assert [row.status for row in rows] == ["done"] * 8
    assert held[0] > 0
    assert held[-1] <= 1
    assert max(held) <= 4


def test_unknown_maps_are_refused(predict, images, other, out):
    ran = predict("-i", images, "--save", "probabilites")
    assert ran.status == 2
    assert "Did you mean 'probabilities'?" in ran.err
    ran = predict("-i", images, "--save", "disagreement", models=[other])
    assert ran.status == 2
    assert "disagreement needs several networks" in ran.err
    assert not out.exists()


def test_a_list_names_images(predict, images, tmp_path, out):
    listed = tmp_path / "cases.txt"
    names = [path for case in ("anna", "cora") for path in paths(images, case)]
    listed.write_text("# two of three\r\n" + "\r\n".join(map(str, names)))
    assert predict("-i", listed).status == 0
    assert [row["case"] for row in summary(out)] == ["anna", "cora"]


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    """Two cases of two channels, a folder with a series for each, and the same as NIfTI."""
    root, affine = tmp_path_factory.mktemp("dicom"), make_oblique()
    for number, case in enumerate(("dora", "emil")):
        channels = make_channels((9, 12, 8 + number), seed=10 + number).astype(np.int16)
        write_case(root / "nifti", case, channels, affine)
        for channel, values in enumerate(channels):
            folder = root / "series" / f"{case}_{channel:04d}"
            folder.parent.mkdir(exist_ok=True)
            write_series(folder, values, affine, [f"slice{k}" for k in range(values.shape[2])])
    return root


class TestDicom:
    def check(self, ran, out, dicom, model, cases):
        assert ran.status == 0, ran.err
        assert [row["file"] for row in summary(out)] == [f"{case}.nii.gz" for case in cases]
        for case in cases:
            expected = model.predict(paths(dicom / "nifti", case), tta="none")
            found = nib.load(out / f"{case}.nii.gz")
            np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
            np.testing.assert_array_equal(labels_of(out / f"{case}.nii.gz"), expected.segmentation)

    def test_sub_folders_hold_a_channel_each(self, predict, dicom, model, out):
        ran = predict("-i", dicom / "series")
        self.check(ran, out, dicom, model, ["dora", "emil"])

    def test_series_folders_are_inputs(self, predict, dicom, model, out):
        folders = [dicom / "series" / f"emil_000{number}" for number in (1, 0)]
        ran = predict("-i", folders[0], "-i", folders[1])
        self.check(ran, out, dicom, model, ["emil"])

    def test_a_series_and_a_file_may_be_one_case(self, predict, dicom, model, out, tmp_path):
        shutil.copy(dicom / "nifti/dora_0001.nii.gz", tmp_path)
        ran = predict("-i", dicom / "series/dora_0000", "-i", tmp_path / "dora_0001.nii.gz")
        self.check(ran, out, dicom, model, ["dora"])

    def test_one_channel_needs_no_number(self, predict, dicom, tmp_path, out):
        plans = make_plans()
        tiny = plans.configurations["tiny"].model_copy(
            update={"normalization": ("zscore",), "use_mask_for_norm": (True,)}
        )
        plans = plans.model_copy(
            update={"configurations": {"tiny": tiny}, "intensity": plans.intensity[:1]}
        )
        bundle = make_bundle(
            tmp_path / "one", plans=plans, spec=make_spec(channels=("T1w",)), folds=1
        )
        shutil.copytree(dicom / "series/dora_0000", tmp_path / "patients/fred")
        ran = predict("-i", tmp_path / "patients", models=[bundle.folder])
        assert ran.status == 0, ran.err
        ran = predict("-i", tmp_path / "patients/fred", "--overwrite", models=[bundle.folder])
        assert ran.status == 0, ran.err
        expected = load(bundle.folder, device="cpu", mode="exact").predict(
            dicom / "nifti/dora_0000.nii.gz", tta="none"
        )
        np.testing.assert_array_equal(labels_of(out / "fred.nii.gz"), expected.segmentation)

    def test_a_broken_series_fails_alone(self, predict, dicom, out, tmp_path):
        shutil.copytree(dicom / "series", tmp_path / "series")
        (tmp_path / "series/dora_0001/slice3").unlink()
        ran = predict("-i", tmp_path / "series")
        assert ran.status == 1
        assert [row["status"] for row in summary(out)] == ["failed", "done"]
        assert "dora_0001" in summary(out)[0]["message"]


class TestSeveralModels:
    def test_their_shares_are_weighted(self, predict, images, bundle, other, out):
        ran = predict("-i", images, "--weights", "3,1", models=[bundle, other])
        assert ran.status == 0, ran.err
        both = load([bundle, other], device="cpu", mode="exact", weights=[3, 1])
        equal = load([bundle, other], device="cpu", mode="exact")
        case = paths(images, "anna")
        found = labels_of(out / "anna.nii.gz")
        np.testing.assert_array_equal(found, both.predict(case, tta="none").segmentation)
        assert (found != equal.predict(case, tta="none").segmentation).any()
        folds = json.loads((out / "anna.json").read_text())["provenance"]["folds"]
        assert folds == ["0/fold_0", "0/fold_1", "1/fold_0"]

    def test_a_number_of_weights_that_does_not_fit_is_refused(self, predict, images, out):
        ran = predict("-i", images, "--weights", "2,1")
        assert ran.status == 2
        assert "weights are 2, 1; expected 1 number" in ran.err
        ran = predict("-i", images, "--weights", "two")
        assert ran.status == 2
        assert "expected numbers such as" in ran.err
        assert not out.exists()


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    root, two = tmp_path_factory.mktemp("stages"), Two(Make)
    return two.second(root / "second", two.first(root / "first").folder).folder


class TestPreviousStage:
    def test_label_maps_take_the_place_of_the_first_stage(
        self, predict, images, cascade, tmp_path, out
    ):
        assert predict("-i", images, models=[cascade]).status == 0
        whole = {case: labels_of(out / f"{case}.nii.gz") for case in SHAPES}
        first = load(cascade, device="cpu", mode="exact").previous
        maps = tmp_path / "first"
        maps.mkdir()
        for case in SHAPES:
            first.predict(paths(images, case), tta="none").save(maps / f"{case}.nii.gz")
        again = ("-i", images, "--previous-stage", maps, "--overwrite")
        assert predict(*again, models=[cascade]).status == 0
        for case in SHAPES:
            found = labels_of(out / f"{case}.nii.gz")
            assert (found == whole[case]).mean() > 0.9
        for path in maps.iterdir():
            image = nib.load(path)
            nothing = np.zeros(image.shape, np.uint16)
            nib.save(nib.Nifti1Image(nothing, image.affine), path)
        assert predict(*again, models=[cascade]).status == 0
        assert any((labels_of(out / f"{c}.nii.gz") != whole[c]).any() for c in SHAPES)

    def test_missing_label_maps_are_all_named(self, predict, images, cascade, tmp_path, out):
        maps = tmp_path / "first"
        maps.mkdir()
        ran = predict("-i", images, "--previous-stage", maps, models=[cascade])
        assert ran.status == 2
        assert all(f"case '{case}': no label map" in ran.err for case in SHAPES)
        assert not out.exists()

    def test_a_model_without_first_stage_takes_none(self, predict, images, tmp_path, out):
        maps = tmp_path / "first"
        maps.mkdir()
        for case, shape in SHAPES.items():
            nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), make_oblique()),
                     maps / f"{case}.nii.gz")  # fmt: skip
        ran = predict("-i", images, "--previous-stage", maps)
        assert ran.status == 2
        assert "has no stage before it" in ran.err
        assert not out.exists()


def test_postprocessing_has_a_switch(predict, images, bundle, model, tmp_path, out):
    source = read_bundle(bundle)
    steps = (KeepLargest(structures=("left",), connectivity=1),)
    processed = write_bundle(
        tmp_path / "processed",
        spec=source.spec,
        plans=source.plans,
        configuration="tiny",
        weights={fold: {"final": source.weights(fold)} for fold in source.manifest.folds},
        semantics=source.manifest.semantics,
        postprocessing=Postprocessing(steps=steps),
    ).folder
    plain = model.predict(paths(images, "anna"), tta="none").segmentation
    assert predict("-i", images, models=[processed]).status == 0
    report = json.loads((out / "anna.json").read_text())
    removed = labels_of(out / "anna.nii.gz") != plain
    assert report["provenance"]["is_postprocessed"]
    assert removed.any()
    assert set(plain[removed]) == {1}
    ran = predict("-i", images, "--overwrite", "--no-postprocess", models=[processed])
    assert ran.status == 0
    np.testing.assert_array_equal(labels_of(out / "anna.nii.gz"), plain)
    report = json.loads((out / "anna.json").read_text())
    assert not report["provenance"]["is_postprocessed"]


def test_exact_is_float32_and_on_record(predict, images, out):
    assert predict("-i", images).status == 0
    provenance = json.loads((out / "anna.json").read_text())["provenance"]
    assert (provenance["precision"], provenance["tta"]) == ("float32", "none")


def test_what_is_written_of_a_case(predict, images, model, bundle, out):
    assert predict("-i", images, "--step", "0.7").status == 0
    result = model.predict(paths(images, "bert"), tta="none", step=0.7)
    report = json.loads((out / "bert.json").read_text())
    assert report["inputs"] == ["bert_0000.nii.gz", "bert_0001.nii.gz"]
    assert report["files"] == {"segmentation": "bert.nii.gz"}
    assert report["volumes_ml"] == pytest.approx(result.volumes_ml)
    assert {name: entry["values"] for name, entry in report["labels"].items()} == {
        "background": [0], "left": [1], "right": [2], "lesion": [3]
    }  # fmt: skip
    assert report["provenance"]["step"] == 0.7
    assert report["provenance"]["bundle"] == bundle.name
    assert str(out.parent) not in (out / "bert.json").read_text()
    with open(out / "summary.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["case"] for row in table] == list(SHAPES)
    for name, volume in result.volumes_ml.items():
        assert float(table[1][f"{name}_ml"]) == pytest.approx(volume)
    assert (table[1]["status"], table[1]["file"]) == ("done", "bert.nii.gz")
    assert float(table[1]["seconds"]) > 0


def test_the_table_fits_a_terminal(predict, images, tmp_path):
    """Also with long names, an error and a flag."""
    folder = tmp_path / "in"
    shutil.copytree(images, folder)
    long = "sub-0123456789_ses-2026-11-27_acq-mprage_run-02_desc-preprocessed"
    for number in (0, 1):
        shutil.copy(images / f"anna_000{number}.nii.gz", folder / f"{long}_000{number}.nii.gz")
    (folder / "bert_0001.nii.gz").write_bytes(b"no image")
    ran = predict("-i", folder)
    assert ran.status == 1
    assert [line for line in ran.out.splitlines() if len(line) > 80] == []
    assert "3 done, 1 failed" in ran.out
    assert "bert_0001.nii.gz" in "".join(ran.out.split())


class TestForeignFiles:
    """What medseg has not written is not replaced."""

    @pytest.mark.parametrize(
        ("name", "content"),
        [("anna.json", '{"mine": 1}'), ("summary.json", "[1]"), ("summary.csv", "a,b\n1,2\n")],
    )
    def test_reports_and_summaries_of_others(self, predict, images, out, name, content):
        out.mkdir()
        (out / name).write_text(content)
        ran = predict("-i", images)
        assert ran.status == 2
        assert f"{name} would be replaced, and medseg has not written it" in ran.err
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == content

    def test_a_bundle(self, predict, images, bundle, tmp_path):
        copy = tmp_path / "out"
        shutil.copytree(bundle, copy)
        before = sorted(copy.rglob("*"))
        ran = predict("-i", images)
        assert ran.status == 2
        assert "is a bundle" in ran.err
        assert sorted(copy.rglob("*")) == before
