"""Label values of any kind, and cases annotated in part, from the files and back to files."""

from __future__ import annotations

import json

import numpy as np
import pytest

import medseg
from medseg.errors import ConfigError, DatasetError
from medseg.infer.folder import predict_folder
from medseg.io.read import read_image, read_segmentation
from medseg.io.write import write_segmentation
from medseg.models.weights import load_weights
from medseg.schema.base import read_json

NAMES = {0: 255, 1: -3, 2: 1017}
"""Values of the twin: the same in order, so the indices inside are the same."""
ODD = {"background": 255, "organ": -3, "lesion": 1017}


def renamed(array):
    return np.vectorize(NAMES.get)(array).astype(np.int16)


def rewrite(path, function):
    found = read_segmentation(path)
    write_segmentation(path, function(found.array), found.header)


def trained(raw, workspace, recipe):
    medseg.plan_and_preprocess(raw, configurations=["3d_fullres"], workspace=workspace, workers=1)
    return medseg.train(raw, "3d_fullres", 0, recipe=recipe, workspace=workspace)


def test_a_dataset_with_odd_values_is_trained_as_its_twin_with_consecutive_ones(
    tmp_path, datasets, recipe
):
    """Weights and predictions are the same to the bit, but for the names of the values."""
    plain = datasets.write(tmp_path / "plain/Dataset004_Tiny")
    odd = datasets.write(tmp_path / "odd/Dataset004_Tiny", labels=ODD)
    for path in (odd / "labelsTr").iterdir():
        rewrite(path, renamed)
    runs = [trained(raw, raw.parent / "work", recipe) for raw in (plain, odd)]
    weights = [load_weights(run.path / "fold_0/weights/final.safetensors") for run in runs]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    metrics = [run.metrics["fold_0"] for run in runs]
    assert metrics[1].structures == {"organ": (-3,), "lesion": (1017,)}
    for name in ("organ", "lesion"):
        assert metrics[0].summary[name] == metrics[1].summary[name]
    for raw, run in zip((plain, odd), runs, strict=True):
        predict_folder(medseg.load(run.bundle, device="cpu"), [raw / "imagesTr"], raw / "out")
    for path in sorted((plain / "out").glob("*.nii.gz")):
        expected = renamed(read_segmentation(path).array)
        found = read_segmentation(odd / "out" / path.name)
        assert found.array.dtype == np.int16
        np.testing.assert_array_equal(found.array, expected)
    rows = [read_json(raw / "out/summary.json") for raw in (plain, odd)]
    volumes = [[row["volumes_ml"] for row in each["cases"]] for each in rows]
    assert volumes[0] == volumes[1]


@pytest.fixture
def manifest(tmp_path, datasets):
    """A manifest in which case_1 and case_2 have no lesion drawn, and case_3 only the lesion."""
    raw = datasets.write(tmp_path / "Dataset005_Parts")
    annotated = {"case_1": ["organ"], "case_2": ["organ"], "case_3": ["lesion"]}
    hidden = {"case_1": 2, "case_2": 2, "case_3": 1}
    entries = []
    for path in sorted((raw / "labelsTr").iterdir()):
        case = path.name.removesuffix(".nii.gz")
        if case in hidden:
            rewrite(path, lambda array, value=hidden[case]: np.where(array == value, 0, array))
        entry = {
            "case": case,
            "T1w": f"imagesTr/{case}_0000.nii.gz",
            "FLAIR": f"imagesTr/{case}_0001.nii.gz",
            "segmentation": f"labelsTr/{path.name}",
        }
        entries.append(entry | ({"annotated_labels": annotated[case]} if case in annotated else {}))
    description = {
        "channels": ["T1w", "FLAIR"],
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "cases": entries,
    }
    (raw / "medseg.json").write_text(json.dumps(description))
    return raw


def test_cases_annotated_in_part_are_trained_and_scored_for_what_was_drawn(
    manifest, tmp_path, recipe
):
    run = trained(manifest, tmp_path / "work", recipe)
    validated = run.metrics["fold_0"].cases
    drawn = {"case_1": {"organ"}, "case_2": {"organ"}, "case_3": {"lesion"}}
    splits = read_json(run.path.parent.parent / "splits.json")
    assert sorted(validated) == splits[0]["validation"]
    for case, one in validated.items():
        assert set(one.structures) == drawn.get(case, {"organ", "lesion"})
    result = medseg.load(run.bundle, device="cpu").predict(
        [manifest / "imagesTr/case_3_0000.nii.gz", manifest / "imagesTr/case_3_0001.nii.gz"]
    )
    assert set(result.volumes_ml) == {"organ", "lesion"}
    image = read_image(manifest / "imagesTr/case_3_0000.nii.gz")
    assert result.segmentation.shape == image.array.shape


def edit(manifest, case, names):
    values = json.loads((manifest / "medseg.json").read_text())
    next(entry for entry in values["cases"] if entry["case"] == case)["annotated_labels"] = names
    (manifest / "medseg.json").write_text(json.dumps(values))


def test_labels_that_do_not_exist_are_refused(manifest, tmp_path):
    edit(manifest, "case_2", ["organs"])
    with pytest.raises(ConfigError, match="case 'case_2': annotated_labels holds 'organs'"):
        medseg.plan_and_preprocess(manifest, workspace=tmp_path / "work", workers=1)


def test_a_case_that_holds_more_than_was_annotated_is_refused(manifest, tmp_path):
    edit(manifest, "case_4", ["lesion"])
    with pytest.raises(DatasetError, match=r"holds 1 \(organ\), but .* only for lesion"):
        medseg.plan_and_preprocess(manifest, workspace=tmp_path / "work", workers=1)
