"""`medseg dataset check`: what it writes, what it prints, and its exit status."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from medseg.io.read import read_stored
from medseg.io.write import write_nifti
from medseg.report.text import columns
from medseg.schema.base import read
from medseg.schema.check import CheckReport


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, datasets):
    return datasets.write(tmp_path_factory.mktemp("raw") / "Dataset007_Tiny", num_cases=3)


@pytest.fixture
def raw(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "Dataset007_Tiny")


def rewrite(path, array=None):
    stored = read_stored(path)
    write_nifti(path, array(np.array(stored.array)), np.array(stored.header.affine))


def test_healthy_dataset(medseg, raw, tmp_path):
    ran = medseg("dataset", "check", raw, "--workers", 1)
    assert ran.status == 0, ran.err
    assert "3 cases. No problem was found." in ran.out
    folder = tmp_path / "work/datasets/Dataset007_Tiny"
    report = read(CheckReport, folder / "check.json")
    assert list(report.cases) == ["case_1", "case_2", "case_3"]
    page = (folder / "check.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not (folder / "dataset.json").exists()


def test_warnings_alone_are_status_0(medseg, raw):
    rewrite(raw / "labelsTr/case_2.nii.gz", lambda values: values.astype(np.float64))
    ran = medseg("dataset", "check", raw, "--workers", 1)
    assert ran.status == 0
    assert "warning float-label: case 'case_2'" in ran.out


def test_errors_of_description_and_files_are_status_1(medseg, raw, tmp_path):
    """All of several broken cases, a file that is missing said once."""
    rewrite(raw / "labelsTr/case_2.nii.gz", lambda values: np.where(values == 2, 9, values))
    (raw / "imagesTr/case_3_0001.nii.gz").unlink()
    (raw / "labelsTr/case_1.nii.gz").write_bytes(b"")
    ran = medseg("dataset", "check", raw, "--workers", 1)
    assert ran.status == 1
    assert "3 with errors" in ran.out
    assert ran.out.count("error missing-file: case 'case_3'") == 1
    assert all(columns(line) <= 80 for line in ran.out.splitlines() if "check.html" not in line)
    report = read(CheckReport, tmp_path / "work/datasets/Dataset007_Tiny/check.json")
    codes = {p.code for facts in report.cases.values() for p in facts.problems}
    assert codes == {"unexpected-label", "missing-file", "unreadable"}


def test_second_check_reads_only_what_changed(medseg, raw, monkeypatch):
    assert medseg("dataset", "check", raw, "--workers", 1).status == 0
    looked = []
    from medseg.api import survey

    inspect = survey.inspect_case
    monkeypatch.setattr(
        survey, "inspect_case", lambda spec, case: looked.append(case) or inspect(spec, case)
    )
    rewrite(raw / "labelsTr/case_2.nii.gz", lambda values: np.where(values == 2, 9, values))
    assert medseg("dataset", "check", raw, "--workers", 1).status == 1
    assert looked == ["case_2"]


def test_fix_writes_a_copy_that_is_healthy(medseg, raw, tmp_path, datasets):
    rewrite(raw / "labelsTr/case_2.nii.gz", lambda values: values.astype(np.float64))
    before = datasets.files(raw)
    copy = tmp_path / "corrected" / "Dataset007_Tiny"
    ran = medseg("dataset", "check", raw, "--fix", copy, "--workers", 1)
    assert ran.status == 0
    assert "1 problem corrected" in ran.out
    assert datasets.files(raw) == before
    ran = medseg("dataset", "check", copy, "--workers", 1, workspace=tmp_path / "other")
    assert (ran.status, "No problem was found." in ran.out) == (0, True), ran.err


def test_fix_into_a_used_folder_is_refused_at_once(medseg, raw, tmp_path):
    ran = medseg("dataset", "check", raw, "--fix", tmp_path, "--workers", 1)
    assert ran.status == 2
    assert "there already" in ran.err
    assert not (tmp_path / "work").exists()


def test_no_dataset_is_refused(medseg, tmp_path):
    ran = medseg("dataset", "check", tmp_path / "nowhere")
    assert ran.status == 2
    assert "nowhere" in ran.err
