"""`dataset init` on the command line."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def folder(tmp_path, datasets):
    raw = datasets.write(tmp_path / "brains", num_cases=3)
    (raw / "dataset.json").unlink()
    return raw


def test_init_prints_what_it_found_and_what_comes_next(medseg, folder, tmp_path):
    ran = medseg("dataset", "init", folder)
    assert ran.status == 0
    text = " ".join(ran.out.split())
    assert "cases 3: case_1, case_2, case_3" in text
    assert "channels channel_0, channel_1 (2 files a case)" in text
    assert "labels background 0, label_1 1, label_2 2" in text
    assert f"Wrote {folder / 'medseg.json'}" in text
    assert f"medseg plan-and-preprocess {folder}" in text
    assert not (tmp_path / "work").exists()
    assert list(json.loads((folder / "medseg.json").read_text())["cases"]) == [
        "case_1",
        "case_2",
        "case_3",
    ]


def test_init_does_not_overwrite(medseg, folder):
    (folder / "medseg.json").write_text("{}")
    ran = medseg("dataset", "init", folder)
    assert ran.status == 2
    assert "there already" in ran.err
    assert (folder / "medseg.json").read_text() == "{}"


def test_init_with_patterns(medseg, folder):
    pattern = "labelsTr/{case}.nii.gz"
    images = "imagesTr/{case}_0001.nii.gz"
    ran = medseg("dataset", "init", folder, "--images", images, "--segmentations", pattern)
    assert ran.status == 0
    assert "3 named by no pattern" in ran.out
    assert "image (1 file a case)" in ran.out


def test_init_leaves_a_described_folder_alone(medseg, tmp_path, datasets):
    raw = datasets.write(tmp_path / "brains", num_cases=2)
    ran = medseg("dataset", "init", raw)
    assert ran.status == 0
    assert "describes this folder already; nothing was written" in ran.out
    assert not (raw / "medseg.json").exists()


def test_folder_that_was_found_can_be_planned(medseg, folder, tmp_path):
    medseg("dataset", "init", folder)
    ran = medseg("fingerprint", folder, "--workers", 1)
    assert ran.status == 0, ran.err
    assert (tmp_path / "work/datasets/brains/dataset.json").is_file()
