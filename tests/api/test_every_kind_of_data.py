"""Each kind of dataset goes the whole way: prepare, train for a moment, predict, judge.

The networks learn too little to be judged here; that something was learnt and comes out in the
right place, type and values is what counts. A network that saw its images turned against the label
maps, or whose output is turned on the way back, would not find a bright blob where it lies.
"""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Picture

import medseg
from medseg.infer.folder import predict_folder
from medseg.io.read import read_segmentation
from medseg.io.write import write_nifti
from medseg.schema.base import read_json

RECIPE = """
description: learns a bright blob in a few seconds
epochs: 6
iterations_per_epoch: 12
validation_iterations: 1
optimizer: {name: adamw, lr: 5.0e-3, weight_decay: 1.0e-2}
schedule: {name: cosine, warmup: 0.1, per: iteration}
network: {base_features: 8, max_features: 16}
precision: fp32
sampling: {batch_size: 2}
"""
SEED = 11


@pytest.fixture(scope="module")
def blob_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "blob.yaml"
    path.write_text(RECIPE)
    return path


def blob(shape, rng, radius=0.22):
    """Return an ellipsoid far from the centre, so that a turned image does not fit it."""
    centre = [length * rng.uniform(*span) for length, span in zip(shape, SPANS, strict=False)]
    axes = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    pairs = zip(axes, centre, shape, strict=True)
    return sum(((a - c) / (radius * n)) ** 2 for a, c, n in pairs) < 1


SPANS = ((0.25, 0.4), (0.6, 0.75), (0.3, 0.45))


def describe(folder, channels, labels, ending, **more):
    description = {
        "channel_names": {str(n): name for n, name in enumerate(channels)},
        "labels": labels,
        "numTraining": 5,
        "file_ending": ending,
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    for name in ("imagesTr", "labelsTr", "new"):
        (folder / name).mkdir()


def go(folder, config, recipe, **options):
    """Prepare, train fold 0, predict `new`; return (metrics of fold 0, rows, output folder)."""
    work, output = folder.parent / "work", folder.parent / "out"
    medseg.plan_and_preprocess(folder, configurations=[config], workspace=work, workers=1)
    run = medseg.train(folder.name, config, 0, recipe=recipe, seed=SEED, workspace=work, **options)
    model = medseg.load(run.bundle, device="cpu")
    rows = predict_folder(model, [folder / "new"], output, tta="none")
    assert [row.status for row in rows] == ["done"] * len(rows), [row.message for row in rows]
    return run.metrics["fold_0"], rows, output


def dice(metrics, name):
    return metrics.summary[name].dice.mean


def test_pictures_in_colour(tmp_path, blob_recipe):
    """2D RGB in PNG: one file holds the three channels, predictions are PNG of the same size."""
    folder, rng = tmp_path / "Dataset020_Colour", np.random.default_rng(1)
    folder.mkdir()
    describe(folder, ("R", "G", "B"), {"background": 0, "nucleus": 1}, ".png")
    for number in range(6):
        rows, columns = 40 + 2 * number, 56 - 2 * number
        inside = blob((rows, columns), rng)
        picture = rng.integers(100, 140, (rows, columns, 3)).astype(np.uint8)
        picture[inside] = (40, 60, 160)  # blue, no brighter than the rest
        where = "new" if number == 5 else "imagesTr"
        Picture.fromarray(picture).save(folder / where / f"slide {number}_0000.png")
        if number < 5:
            Picture.fromarray(inside.astype(np.uint8)).save(folder / f"labelsTr/slide {number}.png")
    metrics, rows, output = go(folder, "2d", blob_recipe)
    assert dice(metrics, "nucleus") > 0.5
    assert [row.file for row in rows] == ["slide 5.png"]
    found = np.asarray(Picture.open(output / "slide 5.png"))
    assert found.shape == (50, 46)
    assert found.dtype == np.uint8
    assert 2 * (found * inside).sum() / (found.sum() + inside.sum()) > 0.5


def test_grey_pictures_with_masks_of_0_and_255(tmp_path, blob_recipe):
    """2D grey, mixed endings, labels as painting programs write them: 255 comes back."""
    folder, rng = tmp_path / "Dataset021_Grey", np.random.default_rng(2)
    folder.mkdir()
    describe(folder, ("light",), {"background": 0, "cell": 255}, ".png")
    for number in range(6):
        inside = blob((45, 60), rng)
        picture = (90 + 20 * rng.standard_normal((45, 60)) + 70 * inside).clip(0, 255)
        ending = ("png", "tif", "bmp")[number % 3]
        where = "new" if number == 5 else "imagesTr"
        name = f"c{number}_0000.{ending}"
        Picture.fromarray(picture.astype(np.uint8)).save(folder / where / name)
        if number < 5:
            mask = Picture.fromarray(inside.astype(np.uint8) * 255)
            mask.save(folder / f"labelsTr/c{number}.png")
    metrics, rows, output = go(folder, "2d", blob_recipe)
    assert dice(metrics, "cell") > 0.5
    assert [row.file for row in rows] == ["c5.bmp"]
    found = np.asarray(Picture.open(output / "c5.bmp"))
    assert set(np.unique(found)) == {0, 255}
    overlap = np.count_nonzero(found.astype(bool) & inside)
    assert 2 * overlap / (np.count_nonzero(found) + inside.sum()) > 0.5
    assert rows[0].volumes_ml["cell"] > 0


def test_thick_slices_in_many_orientations(tmp_path, blob_recipe, datasets):
    """3D, 5 mm slices, every case stored in another order and direction of its axes."""
    folder, rng = tmp_path / "Dataset022_Thick", np.random.default_rng(3)
    folder.mkdir()
    describe(folder, ("T2w",), {"background": 0, "cyst": 1}, ".nii.gz")
    shape, stored = (40, 48, 12), {}
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0), (1, 0, 2)]
    for number, order in enumerate(orders):
        inside = blob(shape, rng, radius=0.28)
        image = (100 + 15 * rng.standard_normal(shape) + 60 * inside).astype(np.float32)
        affine = datasets.affine((0.8, 0.8, 5.0))
        turned = [nib.orientations.apply_orientation(a, _way(order)) for a in (image, inside)]
        placed = affine @ nib.orientations.inv_ornt_aff(_way(order), shape)
        where = "new" if number == 5 else "imagesTr"
        write_nifti(folder / where / f"p{number}_0000.nii.gz", turned[0], placed)
        stored[number] = turned[1].astype(np.uint8), placed
        if number < 5:
            write_nifti(folder / f"labelsTr/p{number}.nii.gz", stored[number][0], placed)
    metrics, _, output = go(folder, "3d_fullres", blob_recipe)
    assert dice(metrics, "cyst") > 0.5
    plans = read_json(tmp_path / "work/datasets" / folder.name / "plans/nnunet.json")
    assert plans["configurations"]["3d_fullres"]["spacing"][0] == pytest.approx(5.0)
    found = nib.load(output / "p5.nii.gz")
    expected, affine = stored[5]
    np.testing.assert_array_equal(found.affine, nib.load(folder / "new/p5_0000.nii.gz").affine)
    array = np.asarray(found.dataobj)
    assert 2 * (array * expected).sum() / (array.sum() + expected.sum()) > 0.5


def _way(order):
    """Return nibabel's orientation: these axes in another order, the second one reversed."""
    return np.array([[axis, -1 if axis == 1 else 1] for axis in order], dtype=float)


def test_several_channels_regions_and_an_ignore_label(tmp_path, blob_recipe, datasets):
    """3 channels in 3 formats; overlapping regions with gaps in their values; ignored voxels."""
    folder, rng = tmp_path / "Dataset023_Regions", np.random.default_rng(4)
    folder.mkdir()
    labels = {"background": 0, "whole": [10, 20], "core": [20], "ignore": 99}
    describe(folder, ("T1w", "FLAIR", "T2w"), labels, ".nii.gz", regions_class_order=[10, 20])
    shape, affine = (36, 30, 26), datasets.affine((1.0, 1.2, 1.4))
    for number in range(6):
        whole = blob(shape, rng, radius=0.33)
        core = whole & (np.arange(shape[0])[:, None, None] < shape[0] * 0.33)
        segmentation = np.where(core, 20, np.where(whole, 10, 0)).astype(np.uint8)
        if number < 3:
            segmentation[:, :5] = 99  # what lies there was not looked at
        images = 50 + 8 * rng.standard_normal((3, *shape))
        images[0] += 40 * whole
        images[1] += 40 * core
        where = "new" if number == 5 else "imagesTr"
        for channel, ending in enumerate((".nii.gz", ".nrrd", ".mha")):
            name = f"q{number}_{channel:04d}{ending}"
            write_nifti(folder / where / name, images[channel].astype(np.float32), affine)
        if number < 5:
            write_nifti(folder / f"labelsTr/q{number}.nii.gz", segmentation, affine)
    metrics, rows, output = go(folder, "3d_fullres", blob_recipe)
    assert set(metrics.summary) == {"whole", "core"}
    assert dice(metrics, "whole") > 0.5
    found = read_segmentation(output / "q5.nii.gz").array
    assert set(np.unique(found)) <= {0, 10, 20}
    assert 2 * np.count_nonzero((found > 0) & whole) / ((found > 0).sum() + whole.sum()) > 0.5
    assert set(rows[0].volumes_ml) == {"whole", "core"}


def test_partly_labelled_cases(tmp_path, blob_recipe, datasets):
    """Half of the cases show the left blob only, half the right one only; both are learnt."""
    folder, rng = tmp_path / "partly", np.random.default_rng(5)
    folder.mkdir()
    cases, shape, affine = [], (26, 24, 20), datasets.affine((1.0, 1.2, 1.4))
    for number in range(8):
        bright, dark = blob(shape, rng), blob(shape, rng)[::-1, ::-1]
        image = 100 + 8 * rng.standard_normal(shape) + 60 * bright - 60 * (dark & ~bright)
        drawn = ("bright", "dark")[number % 2]
        segmentation = bright * 1000 if drawn == "bright" else (dark & ~bright) * 7
        write_nifti(folder / f"i{number}.nii.gz", image.astype(np.float32), affine)
        write_nifti(folder / f"s{number}.nii.gz", segmentation.astype(np.int16), affine)
        cases.append(
            {
                "case": f"r{number}",
                "image": f"i{number}.nii.gz",
                "segmentation": f"s{number}.nii.gz",
                "annotated_labels": [drawn],
            }
        )
    labels = {"background": 0, "bright": 1000, "dark": 7}
    manifest = {"channels": ["image"], "labels": labels, "cases": cases}
    (folder / "medseg.json").write_text(json.dumps(manifest))
    (folder / "new").mkdir()
    write_nifti(folder / "new/r9.nii.gz", image.astype(np.float32), affine)
    metrics, _, output = go(folder, "3d_fullres", blob_recipe, iterations=150)
    assert any(metrics.summary[name].dice.mean is not None for name in ("bright", "dark"))
    found = read_segmentation(output / "r9.nii.gz").array
    for value, truth in ((1000, bright), (7, dark & ~bright)):
        held = found == value
        assert 2 * np.count_nonzero(held & truth) / (held.sum() + truth.sum()) > 0.5, value
