"""Predicting folders: all problems first, then one case at a time."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg.errors import ConfigError, DatasetError
from medseg.infer import folder as folder_module
from medseg.infer.folder import collect_cases, predict_folder
from medseg.infer.model import load

CHANNELS = ("T1w", "CT")


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def model(bundle_folder):
    return load(bundle_folder, device="cpu", mode="exact", folds=[0])


def test_files_are_grouped_by_case(tmp_path):
    folder = touch(
        tmp_path / "in",
        "b_0001.nii.gz", "b_0000.nii.gz", "a_2_0000.nrrd", "a_2_0001.nrrd",
        "notes.txt", "b.json", ".DS_Store",
    )  # fmt: skip
    (folder / "deeper").mkdir()
    cases = collect_cases([folder], CHANNELS)
    assert list(cases) == ["a_2", "b"]
    assert [path.name for path in cases["b"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_no_suffix_means_one_channel(tmp_path):
    folder = touch(tmp_path, "a.nii.gz", "b_0000.nii.gz", "c_01.nii.gz")
    assert list(collect_cases([folder], ["T1w"])) == ["a", "b", "c_01"]


def test_files_and_folders_may_be_mixed_and_named_twice(tmp_path):
    one = touch(tmp_path / "one", "a_0000.nii.gz", "a_0001.nii.gz")
    two = touch(tmp_path / "two", "b_0000.nii", "b_0001.nii", "c_0000.nii", "c_0001.nii")
    cases = collect_cases(
        [one, one / "a_0000.nii.gz", two / "b_0000.nii", two / "b_0001.nii"], CHANNELS
    )
    assert list(cases) == ["a", "b"]


def test_data_files_of_a_header_are_no_images_of_their_own(tmp_path):
    folder = touch(
        tmp_path, "a.hdr", "a.img", "b.mhd", "b.raw", "c.mhd", "c.zraw", "d.nhdr", "d.raw.gz"
    )
    cases = collect_cases([folder], ["T1w"])
    assert [paths[0].name for paths in cases.values()] == ["a.hdr", "b.mhd", "c.mhd", "d.nhdr"]


def test_one_file_may_hold_every_channel(make, tmp_path):
    channels = make.channels((5, 6, 7))
    nib.save(nib.Nifti1Image(np.moveaxis(channels, 0, 3), make.oblique()), tmp_path / "four.nii")
    assert list(collect_cases([tmp_path], CHANNELS)) == ["four"]
    with pytest.raises(DatasetError, match=r"case 'four': got channels 0000 \(four.nii\)"):
        collect_cases([tmp_path], ("T1w", "CT", "FLAIR"))


RGB = ("R", "G", "B")


def colours(seed=0, rows=17, columns=23):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


def test_pictures_in_colours_hold_all_channels(tmp_path):
    """With and without number, whatever their endings; a fourth channel may follow."""
    for name in ("a.png", "b_0000.png", "c_0000.jpg", "d.bmp", "e_0000.tif", "f_0000.png"):
        Image.fromarray(colours()).save(tmp_path / name)
    cases = collect_cases(sorted(tmp_path.iterdir()), RGB)
    assert list(cases) == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(DatasetError, match=r"case 'a': got channels 0000 \(a\.png\); expected"):
        collect_cases([tmp_path], (*RGB, "depth"))
    Image.fromarray(colours()[..., 0]).save(tmp_path / "f_0001.png")
    found = collect_cases([tmp_path / "f_0000.png", tmp_path / "f_0001.png"], (*RGB, "depth"))
    assert [path.name for path in found["f"]] == ["f_0000.png", "f_0001.png"]


def test_several_files_for_one_picture_are_a_problem(tmp_path):
    for name in ("a.png", "a_0000.jpg"):
        Image.fromarray(colours()).save(tmp_path / name)
    with pytest.raises(DatasetError, match="case 'a': several files claim one channel"):
        collect_cases([tmp_path], RGB)


def test_a_damaged_picture_is_reported_when_its_turn_comes(tmp_path):
    touch(tmp_path, "a_0000.png")
    assert list(collect_cases([tmp_path], RGB)) == ["a"]


def test_endings_may_differ_within_a_case(tmp_path):
    folder = touch(tmp_path, "a_0000.nii.gz", "a_0001.mha")
    assert [path.name for path in collect_cases([folder], CHANNELS)["a"]] == [
        "a_0000.nii.gz", "a_0001.mha"
    ]  # fmt: skip


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
    assert json.loads((tmp_path / "out" / "c.json").read_text()) == {"spacing": [0.5, 0.25]}
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["a.png", "b.png", "c.json", "c.tif", "d.bmp", "summary.json"]


def test_every_problem_is_listed_at_once(tmp_path):
    folder = touch(
        tmp_path / "in",
        "a_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz", "c_0001.nii.gz", "c_0002.nii.gz",
        "d_0000.nii.gz", "d_0000.nrrd", "d_0001.nrrd", "e_0000.nii.gz", "e_0001.nii.gz",
        "picture.gif",
    )  # fmt: skip
    empty = touch(tmp_path / "empty", "readme.md")
    (empty / "sub").mkdir()
    with pytest.raises(DatasetError) as caught:
        collect_cases([folder, empty, tmp_path / "nowhere"], CHANNELS)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 problems with the input; nothing was predicted:"
    text = "\n".join(lines[1:])
    assert "picture.gif: 'picture.gif' has an unknown ending; expected one of: .nii.gz" in text
    assert "empty: holds no image (1 other files, 1 folders); expected CASE_0000.nii.gz" in text
    assert "nowhere: no such file or folder" in text
    expected = "expected 0000 (T1w), 0001 (CT)"
    assert f"case 'a': got channels 0000 (a_0000.nii.gz); {expected}" in text
    assert f"case 'b': got channels 0001 (b_0001.nii.gz); {expected}" in text
    assert f"0002 (c_0002.nii.gz); {expected}" in text
    assert "case 'd': several files claim one channel: " in text
    assert "'e'" not in text


def test_a_long_list_of_problems_is_cut(tmp_path):
    folder = touch(tmp_path, *(f"case{number:02d}_0000.nii.gz" for number in range(25)))
    with pytest.raises(DatasetError, match=r"25 problems(.|\n)*\.\.\. and 5 more"):
        collect_cases([folder], CHANNELS)


def test_no_input_is_a_problem():
    with pytest.raises(DatasetError, match="no input was given"):
        collect_cases([], CHANNELS)


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
    assert written == ["anna.nii.gz", "cora.nii.gz", "summary.json"]
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
    summary = json.loads((tmp_path / "out" / folder_module.SUMMARY).read_text())
    assert [row["case"] for row in summary["cases"]] == ["anna"]
