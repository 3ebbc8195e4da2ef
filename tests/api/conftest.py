"""A small dataset, prepared once, and a recipe that trains in a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import medseg

RECIPE = """
description: trains in a second
epochs: 2
iterations_per_epoch: 3
validation_iterations: 1
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 1.0e-2}
schedule: {name: cosine, warmup: 0.1, per: iteration}
network: {base_features: 4, max_features: 8}
augmentation: {mirror_axes: [0]}
precision: fp32
"""
CONFIGURATIONS = ["2d", "3d_fullres"]


@pytest.fixture(autouse=True)
def _quick(few_samples, one_thread):
    """Every test of this folder computes with one thread and small samples."""
    with few_samples():
        yield


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, datasets, few_samples) -> Path:
    """Folder with the raw data and a workspace that has plans and preprocessed cases."""
    root = tmp_path_factory.mktemp("prepared")
    raw = datasets.write(root / "Dataset004_Tiny")
    with few_samples():
        medseg.plan_and_preprocess(
            raw, configurations=CONFIGURATIONS, workspace=root / "work", workers=1
        )
    return root


@pytest.fixture
def workspace(prepared, tmp_path) -> Path:
    """A workspace of one's own."""
    return Path(shutil.copytree(prepared / "work", tmp_path / "work"))
