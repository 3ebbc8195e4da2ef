"""Predicting folders: all problems first, then one case at a time."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import ConfigError, DatasetError
from medseg.infer.folder import predict_folder
from medseg.infer.loading import load

SUMMARIES = ["summary.csv", "summary.json"]


@pytest.fixture(scope="module")
def model(bundle_folder):
    return load(bundle_folder, device="cpu", mode="exact", folds=[0])


RGB = ("R", "G", "B")


def colours(seed=0, rows=17, columns=23):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def picture_model(make, tmp_path_factory):
    plans = make.plans(spacing=(1.0, 1.0), patch_size=(16, 16), network_axes=(2, 1, 0))
    tiny = plans.configurations["tiny"].model_copy(
        update={"normalization": ("rgb_0_1",) * 3, "use_mask_for_norm": (False,) * 3}
    )
    plans = plans.model_copy(
        update={"configurations": {"tiny": tiny}, "intensity": plans.intensity[:1] * 3}
    )
    folder = tmp_path_factory.mktemp("pictures") / "bundle"
    return load(
        make.bundle(folder, plans=plans, spec=make.spec(channels=RGB), folds=1).folder,
        device="cpu", mode="exact", folds=[0],
    )  # fmt: skip


def test_pictures_are_predicted_in_their_own_rows_and_columns(picture_model, tmp_path):
    """PNG for JPEG; the voxel size beside a picture is written beside its result."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a_0000.png", "b.jpg", "c_0000.tif", "d.bmp")):
        Image.fromarray(colours(number, 17 + number, 23)).save(folder / name)
    (folder / "c.json").write_text('{"spacing": [0.5, 0.25]}')
    rows = predict_folder(picture_model, [folder], tmp_path / "out", tta="none")
    assert [(row.message, row.file) for row in rows] == [
        ("", "a.png"), ("", "b.png"), ("", "c.tif"), ("", "d.bmp")
    ]  # fmt: skip
    for number, row in enumerate(rows):
        source = sorted(path for path in folder.iterdir() if path.stem[0] == row.case)[-1]
        expected = picture_model.predict(source, tta="none").segmentation
        with Image.open(tmp_path / "out" / row.file) as image:
            assert image.size == (23, 17 + number)
            np.testing.assert_array_equal(np.asarray(image), expected[:, :, 0].T)
    assert json.loads((tmp_path / "out" / "c.json").read_text())["spacing"] == [0.5, 0.25]
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    reports = [f"{case}.json" for case in "abcd"]
    assert found == sorted(["a.png", "b.png", "c.tif", "d.bmp", *reports, *SUMMARIES])


def test_a_folder_is_predicted_and_a_bad_case_reported(model, make, tmp_path):
    affine = make.oblique()
    for number, case in enumerate(("anna", "bert", "cora")):
        shape = (14 + number, 12, 10)
        make.case(tmp_path / "in", case, make.channels(shape, seed=number), affine, codes=(0, 1))
    broken = tmp_path / "in" / "bert_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    seen = []
    rows = predict_folder(
        model,
        [tmp_path / "in"],
        tmp_path / "out",
        tta="none",
        progress=lambda row, total: seen.append((row.case, total)),
    )
    assert [(row.case, row.status) for row in rows] == [
        ("anna", "done"),
        ("bert", "failed"),
        ("cora", "done"),
    ]
    assert seen == [("anna", 3), ("bert", 3), ("cora", 3)]
    assert "bert_0001.nii.gz" in rows[1].message
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    cases = ["anna.json", "anna.nii.gz", "cora.json", "cora.nii.gz"]
    assert written == sorted([*cases, *SUMMARIES])
    for row in (rows[0], rows[2]):
        paths = [tmp_path / "in" / f"{row.case}_{number:04d}.nii.gz" for number in (0, 1)]
        expected = model.predict(paths, tta="none")
        output = nib.load(tmp_path / "out" / row.file)
        np.testing.assert_array_equal(np.asarray(output.dataobj), expected.segmentation)
        np.testing.assert_allclose(output.affine, affine, atol=1e-5)
        assert (int(output.header["qform_code"]), int(output.header["sform_code"])) == (0, 1)
        assert row.volumes_ml == pytest.approx(expected.volumes_ml)
        assert row.seconds > 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["tta"], summary["step"], summary["folds"]) == ("none", 0.5, ["fold_0"])
    assert [row["status"] for row in summary["cases"]] == ["done", "failed", "done"]


def test_nothing_is_written_when_the_input_is_refused(model, make, tmp_path):
    make.case(tmp_path / "in", "anna", make.channels((6, 7, 8), channels=1), make.oblique())
    with pytest.raises(DatasetError, match="case 'anna': got channels 0000"):
        predict_folder(model, [tmp_path / "in"], tmp_path / "out")
    make.case(tmp_path / "in", "anna", make.channels((6, 7, 8)), make.oblique())
    with pytest.raises(ConfigError, match="step is 2"):
        predict_folder(model, [tmp_path / "in"], tmp_path / "out", step=2)
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_overwritten(model, make, tmp_path):
    channels = make.channels((6, 7, 8))
    four = tmp_path / "anna.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(channels, 0, 3), make.oblique()), four)
    content = four.read_bytes()
    with pytest.raises(DatasetError, match=r"would overwrite the image .*anna\.nii\.gz"):
        predict_folder(model, [tmp_path], tmp_path)
    assert four.read_bytes() == content


def test_the_output_must_be_a_folder(model, make, tmp_path):
    make.case(tmp_path / "in", "anna", make.channels((6, 7, 8)), make.oblique())
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DatasetError, match="out: is a file; expected a folder"):
        predict_folder(model, [tmp_path / "in"], tmp_path / "out")


def test_a_result_that_cannot_be_written_is_reported(model, make, tmp_path):
    for case in ("anna", "bert"):
        make.case(tmp_path / "in", case, make.channels((6, 7, 8)), make.oblique())
    (tmp_path / "out" / "anna.nii.gz").mkdir(parents=True)
    rows = predict_folder(model, [tmp_path / "in"], tmp_path / "out", tta="none")
    assert [row.status for row in rows] == ["failed", "done"]
    assert "anna.nii.gz: not written" in rows[0].message


def test_an_interrupted_run_leaves_its_summary(model, make, tmp_path):
    for case in ("anna", "bert"):
        make.case(tmp_path / "in", case, make.channels((6, 7, 8)), make.oblique())

    def interrupt(row, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_folder(model, [tmp_path / "in"], tmp_path / "out", tta="none", progress=interrupt)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["case"] for row in summary["cases"]] == ["anna"]


def test_results_may_not_take_each_others_place(model, make, tmp_path):
    """A case called like another one's map."""
    for case in ("a", "a.probabilities"):
        make.case(tmp_path / "in", case, make.channels((6, 7, 8)), make.oblique(), ending=".nii")
    with pytest.raises(DatasetError, match=r"'a' and 'a.probabilities' would both write"):
        predict_folder(model, [tmp_path / "in"], tmp_path / "out", save=["probabilities"])
    rows = predict_folder(model, [tmp_path / "in"], tmp_path / "out", tta="none")
    assert [row.status for row in rows] == ["done", "done"]


def test_results_do_not_lie_among_the_images(model, make, tmp_path):
    """They would be taken for images the next time."""
    make.case(tmp_path / "in", "anna", make.channels((6, 7, 8)), make.oblique())
    with pytest.raises(DatasetError, match="would lie among the images"):
        predict_folder(model, [tmp_path / "in"], tmp_path / "in")
    assert len(list((tmp_path / "in").iterdir())) == 2
