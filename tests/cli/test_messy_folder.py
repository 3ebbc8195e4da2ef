"""A folder as it comes: five spinal cords, three orientations, no description, one wrong affine.

Every step is the command a user types; no file is made by hand but the recipe, for a run that ends
in seconds. Other measurements of the same folder stand in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

DATA = Path(__file__).parents[2] / "../shared/data/spinal_cord"
RECIPE = """
description: a moment of training
iterations_per_epoch: 10
validation_iterations: 1
optimizer: {name: adamw, lr: 3.0e-3}
schedule: {name: cosine, warmup: 0.1, per: iteration}
network: {base_features: 4, max_features: 16}
precision: fp32
"""
NAMES = ("mt0", "mt1", "t1", "t2", "t2s")


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_five_spinal_cords_from_folder_to_prediction(tmp_path, monkeypatch, medseg):
    monkeypatch.chdir(tmp_path)
    for part in ("imagesTr", "labelsTr"):
        Path("cords", part).mkdir(parents=True)
        for file in (DATA / part).iterdir():
            shutil.copyfile(file, Path("cords", part, file.name))
    Path("moment.yaml").write_text(RECIPE)
    before = {path: path.read_bytes() for path in Path("cords").rglob("*.nii.gz")}

    shown = medseg("dataset", "init", "cords")
    assert shown.status == 0, shown.err
    assert all(name in shown.out for name in NAMES)
    checked = medseg("dataset", "check", "cords")
    assert checked.status == 0, checked.out + checked.err
    assert Path("work/datasets/cords/check.html").stat().st_size > 1000
    report = json.loads(Path("work/datasets/cords/check.json").read_text())
    assert sorted(report["cases"]) == sorted(NAMES)
    assert {facts["orientation"] for facts in report["cases"].values()} == {"RAS", "PSR", "LAS"}

    prepared = medseg("plan-and-preprocess", "cords", "-c", "3d_fullres", "--plans", "cpu")
    assert prepared.status == 0, prepared.err
    options = ["--plans", "cpu", "--recipe", "moment.yaml", "--iterations", "20"]
    trained = medseg("train", "cords", "3d_fullres", "0", *options)
    assert trained.status == 0, trained.err
    model = "work/datasets/cords/runs/cpu__3d_fullres__moment"
    predicted = medseg("predict", "-i", "cords/imagesTr", "-o", "out", "-m", model, "--tta", "none")
    assert predicted.status == 0, predicted.err

    for name in NAMES:
        image = nib.load(f"cords/imagesTr/{name}.nii.gz")
        found = nib.load(f"out/{name}.nii.gz")
        assert found.shape == image.shape[:3]
        np.testing.assert_array_equal(found.affine, image.affine)
        for code in ("qform_code", "sform_code"):
            assert int(found.header[code]) == int(image.header[code])
        assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}
    assert {path: path.read_bytes() for path in before} == before
