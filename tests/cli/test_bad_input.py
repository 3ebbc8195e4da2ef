"""Bad input: one clear error, exit status 2, and nothing half-written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from medseg.io.read import read_image
from medseg.io.write import write_nifti


@pytest.fixture(scope="session")
def good(tmp_path_factory, datasets):
    return datasets.write(tmp_path_factory.mktemp("raw") / "Dataset007_Tiny", num_cases=3)


@pytest.fixture
def raw(good, tmp_path):
    return shutil.copytree(good, tmp_path / "Dataset007_Tiny")


def rewrite(path, change):
    image = read_image(path)
    write_nifti(path, change(image.array), image.grid.affine)


def drop_channel(raw):
    (raw / "imagesTr/case_2_0001.nii.gz").unlink()


def add_label(raw):
    def change(array):
        array = array.astype(np.uint8)
        array[3, 4, 5] = 7
        return array

    rewrite(raw / "labelsTr/case_2.nii.gz", change)


def cut_segmentation(raw):
    rewrite(raw / "labelsTr/case_2.nii.gz", lambda array: array[:, :, :-1].astype(np.uint8))


def cut_second_channel(raw):
    rewrite(raw / "imagesTr/case_2_0001.nii.gz", lambda array: array[:, :-2])


def truncate(raw):
    path = raw / "imagesTr/case_2_0000.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def garbage(raw):
    (raw / "imagesTr/case_2_0000.nii.gz").write_bytes(b"this is no image" * 20)


BAD = {
    "missing channel": (
        drop_channel,
        ["case_2", "_0001.nii.gz is missing", "channel 1, FLAIR", "Add"],
    ),
    "unknown label": (
        add_label,
        ["case_2", "holds 7", "0, 1, 2", "1 organ", "Correct the segmentation"],
    ),
    "segmentation of another shape": (
        cut_segmentation,
        ["case_2", "(20, 22, 15)", "(20, 22, 16)", "Re-export"],
    ),
    "channel of another shape": (
        cut_second_channel,
        ["case_2_0000", "case_2_0001", "(20, 20, 16)", "(20, 22, 16)", "resample"],
    ),
    "truncated file": (truncate, ["case_2", "case_2_0000.nii.gz"]),
    "garbage file": (garbage, ["case_2", "case_2_0000.nii.gz"]),
}


def assert_one_error(ran, expected):
    """Status 2, one message that says everything, no traceback, nothing on standard output."""
    assert ran.status == 2
    assert ran.err.count("Error") == 1, ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    missing = [text for text in expected if text not in ran.err]
    assert missing == [], ran.err


@pytest.mark.parametrize("command", ["plan-and-preprocess", "fingerprint"])
@pytest.mark.parametrize("name", BAD)
def test_bad_training_data_is_refused(medseg, raw, tmp_path, name, command):
    spoil, expected = BAD[name]
    spoil(raw)
    ran = medseg(command, raw, "--workers", 1)
    assert_one_error(ran, expected)
    assert not (tmp_path / "work").exists()


def test_all_bad_cases_are_listed_at_once(medseg, raw, tmp_path):
    add_label(raw)
    path = raw / "imagesTr/case_3_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:100])
    ran = medseg("fingerprint", raw, "--workers", 1)
    assert_one_error(ran, ["2 of 3 cases", "case 'case_2'", "case 'case_3'", "nothing was written"])
    assert not (tmp_path / "work").exists()


def test_empty_folder_is_refused(medseg, tmp_path):
    empty = tmp_path / "Dataset008_Empty"
    empty.mkdir()
    ran = medseg("plan-and-preprocess", empty)
    assert_one_error(ran, [str(empty), "no dataset.json", "it is empty", "Expected"])
    assert not (tmp_path / "work").exists()


def test_folder_without_images_is_refused(medseg, raw, tmp_path):
    for path in (raw / "imagesTr").iterdir():
        path.unlink()
    ran = medseg("plan-and-preprocess", raw)
    assert_one_error(ran, ["imagesTr", "no image there", "CASE_0000.nii.gz"])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("-c", "3d_fulres", ["3d_fulres", "Did you mean '3d_fullres'?"]),
        ("--plans", "nnunett", ["nnunett", "Did you mean 'nnunet'?"]),
        ("--gpu-memory", "lots", ["lots", "8GB"]),
        ("--target-spacing", "1,1", ["target spacing", "(1.0, 1.0)", "3 positive"]),
        ("--target-spacing", "1,x,1", ["1,x,1", "numbers such as"]),
    ],
)
def test_wrong_option_of_planning_leaves_no_trace(medseg, raw, tmp_path, option, value, expected):
    ran = medseg("plan-and-preprocess", raw, option, value, "--workers", 1)
    assert_one_error(ran, expected)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["7", "3d_fulres", "0"], ["3d_fulres", "3d_fullres", "2d", "Did you mean '3d_fullres'?"]),
        (["7", "2d", "0"], ["'2d'", "has not been preprocessed", "medseg preprocess"]),
        (["7", "3d_fullres", "9"], ["fold", "'9'", "0 to 3", "all", "cv"]),
        (["8", "3d_fullres", "0"], ["'8'", "Dataset007_Tiny", "path"]),
        (["Dataset007_Tny", "3d_fullres", "0"], ["Did you mean 'Dataset007_Tiny'?"]),
        (["7", "3d_fullres", "0", "--plans", "own"], ["'own'", "nnunet"]),
        (["7", "3d_fullres", "0", "--recipe", "defualt"], ["Did you mean 'default'?"]),
        (["7", "3d_fullres", "0", "--set", "epoch=3"], ["epoch", "Did you mean 'epochs'?"]),
        (["7", "3d_fullres", "0", "--set", "optimizer.lr=-1"], ["optimizer.lr", "-1"]),
        (["7", "3d_fullres", "0", "--set", "optimizer.name=sdg"], ["sdg", "'sgd'"]),
        (["7", "3d_fullres", "0", "--set", "loss.name=dice_cee"], ["dice_cee", "'dice_ce'"]),
        (["7", "3d_fullres", "0", "--device", "cuda:77"], ["cuda:77", "cpu"]),
        (["7", "3d_fullres", "0", "--budget", "soon"], ["soon", "10m"]),
        (["7", "3d_fullres", "0", "--budget", "1m", "--epochs", "2"], ["budget and epochs"]),
        (["7", "3d_fullres", "0", "--validate-only"], ["no such run", "Train it"]),
        (["7", "3d_fullres", "0", "--epochs", "0"], ["--epochs", "1"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in "78D" else "",
)
def test_wrong_training_command_leaves_no_trace(medseg, workspace, datasets, arguments, expected):
    before = datasets.files(workspace)
    ran = medseg("train", *arguments, workspace=workspace)
    assert_one_error(ran, expected)
    assert datasets.files(workspace) == before


def test_unknown_configuration_of_preprocess(medseg, workspace, datasets):
    before = datasets.files(workspace)
    ran = medseg("preprocess", 7, "-c", "3d_fullres", "-c", "4d", workspace=workspace)
    assert_one_error(ran, ["'4d'", "2d", "3d_fullres"])
    assert datasets.files(workspace) == before


def test_unknown_command_is_refused(medseg, tmp_path):
    ran = medseg("trian", 7)
    assert_one_error(ran, ["trian"])
    assert not (tmp_path / "work").exists()
