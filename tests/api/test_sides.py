"""Labels with sides from the raw data to a prediction."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

import medseg
from medseg.errors import ConfigError
from medseg.schema.base import read_json

RECIPE = """
description: trains in a second, mirrors everything
epochs: 1
iterations_per_epoch: 4
validation_iterations: 1
network: {base_features: 4, max_features: 8}
precision: fp32
"""
PAIRED = {"background": 0, "left part": 30, "right part": 10}
ALONE = {"background": 0, "left part": 1, "spine": 2}


@pytest.fixture(scope="module")
def mirroring_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "mirrors.yaml"
    path.write_text(RECIPE)
    return path


def prepare(root, datasets, labels, configurations):
    """Write an organ cut in two at the middle of I, which points right; plan and preprocess it."""

    def relabel(_number, segmentation):
        halves = np.arange(segmentation.shape[0]) >= segmentation.shape[0] // 2
        left, right = (value for name, value in labels.items() if name != "background")
        sided = np.where(halves, right, left)[:, None, None]
        return np.where(segmentation > 0, sided, 0).astype(np.uint8)

    raw = datasets.write(root / "Dataset006_Sides", labels=labels, relabel=relabel)
    medseg.plan_and_preprocess(
        raw, configurations=configurations, workspace=root / "work", workers=1
    )
    return read_json(root / "work/datasets/Dataset006_Sides/plans/nnunet.json")


def case_of(root):
    return [root / f"Dataset006_Sides/imagesTr/case_1_{number:04d}.nii.gz" for number in (0, 1)]


def test_paired_labels_are_swapped_to_the_end(tmp_path, datasets, mirroring_recipe):
    plans = prepare(tmp_path, datasets, PAIRED, ["2d", "3d_fullres"])
    sides = plans["left_right"]
    assert plans["network_axes"][sides["axis"]] == 0
    assert (sides["policy"], sides["pairs"]) == ("swap", [["left part", "right part"]])
    assert "Mirrored along I (left-right), the two labels of each pair" in plans["why"][-1]
    for config, half_turns in (("3d_fullres", False), ("2d", True)):
        run = medseg.train(
            "6", config, 0, recipe=mirroring_recipe, workspace=tmp_path / "work", device="cpu"
        )
        bundle = read_json(run.bundle / "bundle.json")["semantics"]
        size = plans["configurations"][config]["patch_size"]
        every = list(range(len(size)))
        own = [sides["axis"] - (3 - len(size))]
        assert bundle["mirror_axes"] == every
        assert bundle["swap_axes"] == (
            every if half_turns and max(size) / min(size) <= 1.5 else own
        )
        result = medseg.load(run.bundle, device="cpu").predict(case_of(tmp_path), tta="flips")
        assert set(np.unique(result.segmentation)) <= {0, 10, 30}


def test_a_label_without_partner_is_never_mirrored(tmp_path, datasets, mirroring_recipe, caplog):
    plans = prepare(tmp_path, datasets, ALONE, ["3d_fullres"])
    sides = plans["left_right"]
    assert sides["policy"] == "forbid"
    assert "'left part' has no partner" in plans["why"][-1]
    options = {"recipe": mirroring_recipe, "workspace": tmp_path / "work", "device": "cpu"}
    others = [axis for axis in range(3) if axis != sides["axis"]]
    run = medseg.train("6", "3d_fullres", 0, **options)
    bundle = read_json(run.bundle / "bundle.json")["semantics"]
    assert (bundle["mirror_axes"], bundle["swap_axes"]) == (others, [])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        run = medseg.train(
            "6", "3d_fullres", 0, name="asked", set={"augmentation.mirror_axes": [0, 1, 2]},
            iterations=1, **options,
        )  # fmt: skip
    assert f"augmentation.mirror_axes has {sides['axis']}, but the plans forbid it" in caplog.text
    assert read_json(run.bundle / "bundle.json")["semantics"]["mirror_axes"] == others
    path = tmp_path / "work/datasets/Dataset006_Sides/plans/nnunet.json"
    edited = {"policy": "swap", "axis": sides["axis"], "pairs": [["left part", "right part"]]}
    path.write_text(json.dumps({**plans, "left_right": edited}))
    with pytest.raises(ConfigError, match=r"left_right\.pairs has 'right part'"):
        medseg.train("6", "3d_fullres", 0, name="edited", **options)
