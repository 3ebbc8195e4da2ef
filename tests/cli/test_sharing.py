"""`bundle` and `models`: what the commands print, and what they refuse."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.schema.bundle import Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans

MODELS = Path(__file__).parents[3] / "shared/data/nnunet_models"


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose weights are those of no network."""
    statistics = IntensityStatistics(
        mean=1, std=2, median=1, min=-9, max=9, percentile_00_5=-8, percentile_99_5=8
    )
    entry = Configuration(
        patch_size=(16, 12),
        batch_size=2,
        spacing=(0.9, 1.25),
        median_shape=(24.0, 20.0),
        normalization=("zscore",),
        use_mask_for_norm=(False,),
        batch_dice=False,
        architecture=Architecture(
            kind="plain_unet",
            features=(4, 6),
            kernel_sizes=((3, 3), (3, 3)),
            strides=((1, 1), (2, 2)),
            blocks_encoder=(1, 1),
            blocks_decoder=(1,),
        ),
    )
    return write_bundle(
        tmp_path / "model",
        spec=DatasetSpec(name="Cells", channels=("gray",), labels={"background": 0, "cell": 1}),
        plans=Plans(
            name="nnunet",
            dataset="Cells",
            network_axes=(2, 0, 1),
            original_median_spacing=(2.0, 0.9, 1.25),
            original_median_shape=(1.0, 24.0, 20.0),
            intensity=(statistics,),
            configurations={"2d": entry},
        ),
        configuration="2d",
        weights={"fold_0": {"final": {"a": torch.zeros(5, 7)}}},
        semantics=Semantics(mirror_axes=(1,)),
    )


def test_a_bundle_is_packed_described_and_unpacked(medseg, bundle, tmp_path):
    archive, folder = tmp_path / "cells.zip", tmp_path / "there"
    ran = medseg("bundle", "pack", bundle.folder, "-o", archive)
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"{archive}: ")
    assert ran.out.endswith(", read back and verified.\n")
    described = [medseg("bundle", "info", model) for model in (bundle.folder, archive)]
    assert [ran.status for ran in described] == [0, 0]
    assert "patch size      16 x 12 voxels, axes I, J" in described[0].out
    assert "mirroring       axes J" in described[0].out
    lines = [ran.out.splitlines() for ran in described]
    assert lines[0][1:] == lines[1][1:]
    assert lines[1][0] == str(archive)
    ran = medseg("bundle", "unpack", archive, "-o", folder)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"{folder}: verified. Predict with 'predict -m {folder}'.\n"
    assert read_bundle(folder).manifest == bundle.manifest


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pack", "nowhere", "-o", "a.zip"], "nowhere: no such file or folder"),
        (["pack", "model", "-o", "a.tar"], "ends in .zip"),
        (["unpack", "nowhere.zip", "-o", "x"], "nowhere.zip"),
        (["info", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_a_bundle_that_is_not_there_is_refused(
    medseg, bundle, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    ran = medseg("bundle", *arguments)
    assert ran.status == 2
    assert ran.err.startswith("Error: ")
    assert expected in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_are_listed_and_described(medseg):
    ran = medseg("models", "list")
    assert ran.status == 0
    assert ran.out.splitlines()[-1] == "83 of 83 models"
    ran = medseg("models", "list", "PROSTATE")
    assert "Task005_Prostate " in ran.out
    assert "Task009_Spleen" not in ran.out
    ran = medseg("models", "info", "Task005_Prostate")
    assert ran.status == 0
    assert "images          2: T2, ADC\n" in ran.out
    assert "checksum        not verified\n" in ran.out


def test_a_misspelt_model_gets_near_ones(medseg, tmp_path):
    for command in (["info"], ["fetch", "-o", tmp_path / "x"]):
        ran = medseg("models", *command, "Task09_Spleen")
        assert ran.status == 2
        assert "Did you mean 'Task009_Spleen'?" in ran.err


def test_a_mirror_without_the_file_is_refused(medseg, tmp_path):
    ran = medseg("models", "fetch", "Task009_Spleen", "-o", tmp_path / "x", "--from", tmp_path)
    assert ran.status == 2
    assert "Task009_Spleen.zip: no such file" in ran.err
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs ../shared/data/nnunet_models")
def test_a_model_is_fetched_from_a_mirror(medseg, tmp_path):
    source, inside = MODELS / "v2_aniso", "Dataset150_icb_v0/nnUNetTrainer__nnUNetPlans__3d_fullres"
    with zipfile.ZipFile(tmp_path / "Dataset150_icb_v0.zip", "w") as archive:
        for name in ("plans.json", "dataset.json", "fold_1/checkpoint_final.pth"):
            archive.write(source / name, f"{inside}/{name}")
    output = tmp_path / "bundle"
    command = ["models", "fetch", "Dataset150_icb_v0", "-o", output, "--from", tmp_path]
    ran = medseg(*command)
    assert ran.status == 0, ran.err
    assert "no published checksum to compare with" in ran.out
    assert "Note: TotalSegmentator also crops" in ran.out
    assert ran.out.endswith(f"Predict with 'predict -m {output}'.\n")
    assert read_bundle(output).manifest.folds == ("fold_1",)
    ran = medseg(*command, "--configuration", "3d_fulres")
    assert ran.status == 2
    assert "Did you mean '3d_fullres'?" in ran.err
