"""What preparing a dataset records of its cases, and its way into the bundle of a run."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

import medseg
from medseg.api import survey
from medseg.api.prepare import fingerprint, preprocess
from medseg.api.validation import training_cases
from medseg.bundles.bundle import read_bundle
from medseg.data.case import load_case
from medseg.data.facts import intensities, summarise
from medseg.data.workspace import DatasetFolder, Workspace
from medseg.schema.base import read_json, write_json

LABELS = {"background": 7, "whole": [-1, 3], "lesion": 3, "ignore": 9}
NEW_FIELDS = ("intensities", "volumes_ml", "border_share")


def relabel(number, labels):
    """Give the labels odd values, let the whole touch a face, and leave a corner to be ignored."""
    values = np.array([7, -1, 3], np.int16)[labels]
    values[:, -1, :number] = -1
    values[0, :3, :3] = 9
    return values


@pytest.fixture
def raw(tmp_path, datasets):
    description = {"regions_class_order": [-1, 3]}
    return datasets.write(
        tmp_path / "Dataset005_Regions",
        num_cases=3,
        labels=LABELS,
        relabel=relabel,
        description=description,
    )


def folder_of(raw):
    return Workspace(raw.parent / "work").find(raw)[0]


def measure(raw):
    return fingerprint(raw, workspace=raw.parent / "work", workers=1)


def test_volumes_border_and_intensities_are_those_of_the_files(raw):
    """Oracle: masks of the label map; what is to be ignored is no foreground."""
    found = measure(raw)
    spec = folder_of(raw).spec()
    for name, facts in found.cases.items():
        image = nib.load(raw / f"labelsTr/{name}.nii.gz")
        labels, voxel = np.asarray(image.dataobj), np.prod(image.header.get_zooms()) / 1000
        whole, lesion = np.isin(labels, (-1, 3)), labels == 3
        expected = {"whole": whole.sum() * voxel, "lesion": lesion.sum() * voxel}
        assert facts.volumes_ml == pytest.approx(expected, rel=1e-5)
        inner = whole[1:-1, 1:-1, 1:-1].sum()
        assert facts.border_share == pytest.approx(1 - inner / whole.sum(), rel=1e-5)
        assert facts.border_share > 0
        case = load_case(spec, name)
        assert facts.intensities == intensities(case.channels, case.grid.affine)


def test_only_what_was_annotated_has_a_volume(raw):
    path = raw / "labelsTr/case_2.nii.gz"
    image = nib.load(path)
    labels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where(labels == -1, 7, labels), image.affine), path)
    names = [f"case_{number}" for number in (1, 2, 3)]
    entries = [
        {
            "case": name,
            "T1w": f"imagesTr/{name}_0000.nii.gz",
            "FLAIR": f"imagesTr/{name}_0001.nii.gz",
            "segmentation": f"labelsTr/{name}.nii.gz",
            **({"annotated_labels": ["lesion"]} if name == "case_2" else {}),
        }
        for name in names
    ]
    description = {"channels": ["T1w", "FLAIR"], "labels": LABELS, "regions_class_order": [-1, 3]}
    write_json(raw / "medseg.json", {**description, "cases": entries})
    found = measure(raw)
    assert set(found.cases["case_2"].volumes_ml) == {"lesion"}
    assert found.cases["case_2"].border_share is None
    assert set(found.cases["case_1"].volumes_ml) == {"whole", "lesion"}
    record = summarise(list(found.cases.values()))
    assert record.structures["whole"].num_annotated == 2
    assert record.structures["lesion"].num_annotated == 3


def forget(folder):
    """Leave files as an earlier version wrote them."""
    for path in (folder.check_path, folder.fingerprint_path):
        values = read_json(path)
        for case in values["cases"].values():
            measured = case.get("fingerprint", case)
            for name in NEW_FIELDS:
                del measured[name]
        write_json(path, values)


def test_a_workspace_of_an_earlier_version_is_read_once_more(raw, monkeypatch):
    first = measure(raw)
    folder, looked, look = folder_of(raw), [], survey._look_at
    monkeypatch.setattr(
        survey, "_look_at", lambda spec, n, case: looked.append(case) or look(spec, n, case)
    )
    forget(folder)
    old = folder.fingerprint()
    assert summarise(list(old.cases.values())) is None
    assert old.channels == first.channels
    assert measure(raw) == first == folder.fingerprint()
    assert looked == list(first.cases)
    assert measure(raw) == first
    assert len(looked) == len(first.cases)


def test_preparing_alone_brings_an_old_record_up_to_date(workspace):
    folder = DatasetFolder(workspace / "datasets/Dataset004_Tiny")
    before = folder.fingerprint()
    forget(folder)
    preprocess("Dataset004_Tiny", configurations=["2d"], workspace=workspace, workers=1)
    assert folder.fingerprint() == before


def test_a_run_hands_the_record_of_all_its_cases_to_its_bundle(workspace, recipe, monkeypatch):
    folder = DatasetFolder(workspace / "datasets/Dataset004_Tiny")
    monkeypatch.setattr("medseg.api.training.validate_fold", lambda *_, **__: None)
    run = medseg.train(
        "4", "3d_fullres", 0, recipe=recipe, workspace=workspace, iterations=1, name="one"
    )
    found = read_bundle(run.bundle).training
    assert found == summarise(list(folder.fingerprint().cases.values()))
    split = read_json(folder.splits_path)[0]
    assert found.num_cases == len(split["train"]) + len(split["validation"])
    assert set(found.structures) == {"organ", "lesion"}


def test_a_bundle_can_do_without_a_record(workspace, caplog):
    folder = DatasetFolder(workspace / "datasets/Dataset004_Tiny")
    run = SimpleNamespace(folder=folder)
    assert training_cases(run).num_cases == len(folder.spec().cases)
    folder.fingerprint_path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert training_cases(run) is None
    assert "no record of the training cases" in caplog.text
    folder.fingerprint_path.unlink()
    assert training_cases(run) is None
