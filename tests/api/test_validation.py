"""Validation of a fold is done again when what it is scored against has changed."""

from __future__ import annotations

import os
import shutil

import pytest

import medseg
from medseg.io.read import read_segmentation
from medseg.io.write import write_nifti
from medseg.schema.base import read_json, write_json


@pytest.fixture(scope="module")
def once(tmp_path_factory, prepared, recipe, one_thread):
    """Raw data and a workspace of their own, fold 0 trained for one iteration."""
    root = tmp_path_factory.mktemp("validated")
    shutil.copytree(prepared / "Dataset004_Tiny", root / "Dataset004_Tiny")
    shutil.copytree(prepared / "work", root / "work")
    folder = root / "work/datasets/Dataset004_Tiny"
    for name in ("dataset.json", "check.json"):
        path = folder / name
        path.write_text(path.read_text().replace(str(prepared), str(root)))
    run = medseg.train(
        "4", "3d_fullres", 0, recipe=recipe, workspace=root / "work", iterations=1, name="one"
    )
    return root, folder, run.metrics["fold_0"]


@pytest.fixture
def again(once, recipe):
    """Ask for the same fold again: its scores, and whether they were written anew."""
    root, folder, _ = once
    file = folder / "runs/nnunet__3d_fullres__one/fold_0/validation/metrics.json"

    def train():
        before = file.stat().st_mtime_ns
        run = medseg.train("4", "3d_fullres", 0, recipe=recipe, workspace=root / "work", name="one")
        return run.metrics["fold_0"], file.stat().st_mtime_ns != before

    return train


def reference_of(root, metrics):
    case = sorted(metrics.cases)[0]
    return case, root / f"Dataset004_Tiny/labelsTr/{case}.nii.gz"


def test_a_changed_reference_is_scored_anew(once, again):
    root, _, first = once
    assert again() == (first, False)
    case, path = reference_of(root, first)
    image, content = read_segmentation(path), path.read_bytes()
    write_nifti(path, image.array * (image.array != 2), image.affine)
    changed, is_new = again()
    assert is_new
    lesion = changed.cases[case].structures["lesion"]
    assert (lesion.true_positives, lesion.volume_reference_ml) == (0, 0)
    assert first.cases[case].structures["lesion"].volume_reference_ml > 0
    others = set(first.cases) - {case}
    assert {c: changed.cases[c] for c in others} == {c: first.cases[c] for c in others}
    assert again() == (changed, False)
    path.write_bytes(content)
    assert again() == (first, True)


def test_a_touched_reference_is_not(once, again):
    root, _, first = once
    os.utime(reference_of(root, first)[1], (1, 1))
    assert again() == (first, False)


def test_other_annotated_labels_are_scored_anew(once, again):
    root, folder, first = once
    case, _ = reference_of(root, first)
    before = read_json(folder / "dataset.json")
    values = read_json(folder / "dataset.json")
    values["cases"][case]["annotated_labels"] = ["organ"]
    image = read_segmentation(root / f"Dataset004_Tiny/labelsTr/{case}.nii.gz")
    path = root / f"Dataset004_Tiny/labelsTr/{case}.nii.gz"
    content = path.read_bytes()
    write_nifti(path, image.array * (image.array == 1), image.affine)
    partly, _ = again()
    write_json(folder / "dataset.json", values)
    found, is_new = again()
    assert is_new
    assert set(partly.cases[case].structures) == {"organ", "lesion"}
    assert set(found.cases[case].structures) == {"organ"}
    write_json(folder / "dataset.json", before)
    path.write_bytes(content)
    assert again() == (first, True)


def test_scores_without_a_mark_of_their_references_are_made_anew(once, again):
    _, folder, first = once
    mark = folder / "runs/nnunet__3d_fullres__one/fold_0/validation/references.json"
    mark.unlink()
    assert again() == (first, True)
    assert mark.is_file()
