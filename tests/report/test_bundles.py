"""What a bundle is, in words that fit a terminal."""

from __future__ import annotations

import hashlib

import pytest
import torch

from medseg.bundles.bundle import write_bundle
from medseg.bundles.members import write_chain, write_ensemble
from medseg.errors import BundleError
from medseg.report.bundles import format_bundle
from medseg.schema.bundle import Chain, ChainPart, Resampling, Semantics
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans
from medseg.schema.postprocessing import FillHoles, KeepLargest, Postprocessing, RemoveSmall

STATISTICS = IntensityStatistics(
    mean=40, std=30, median=35, min=-90, max=200, percentile_00_5=-60, percentile_99_5=160
)
WEIGHTS = {
    "encoder.weight": torch.zeros(4, 3, 1, 2, 5),
    "encoder.bias": torch.zeros(4),
    "norm.running_mean": torch.zeros(1000),
    "norm.num_batches_tracked": torch.tensor(7),
}
"""124 parameters, and what is none."""


def make(folder, *, name="3d_fullres", previous_stage=None, spec=None, **parts):
    entry = Configuration(
        patch_size=(8, 16, 12),
        batch_size=2,
        spacing=(2.0, 0.9, 1.25),
        median_shape=(16.0, 24.0, 20.0),
        normalization=("zscore", "ct"),
        use_mask_for_norm=(True, False),
        batch_dice=False,
        architecture=Architecture(
            kind="residual_unet",
            features=(4, 6, 8),
            kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
            strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
            blocks_encoder=(1, 2, 3),
            blocks_decoder=(1, 1),
        ),
        previous_stage=previous_stage,
    )
    labels = {"background": 0, "left": 1, "right": 2, "lesion": 7}
    return write_bundle(
        folder,
        spec=spec or DatasetSpec(name="Dataset007_Liver", channels=("T1w", "CT"), labels=labels),
        plans=Plans(
            name="nnunet",
            dataset="Dataset007_Liver",
            network_axes=(2, 0, 1),
            original_median_spacing=(2.0, 0.9, 1.2),
            original_median_shape=(16.0, 24.0, 20.0),
            intensity=(STATISTICS, STATISTICS),
            configurations={name: entry},
        ),
        configuration=name,
        weights={f"fold_{fold}": {"final": WEIGHTS, "best": WEIGHTS} for fold in (0, 3)},
        **{"semantics": Semantics(mirror_axes=(0, 2)), **parts},
    )


def table(text):
    """Return title -> text of one block, its lines joined."""
    rows = {}
    for line in text.splitlines()[1:]:
        title, value = line[2:18].strip(), line[18:].strip()
        if line[2] != " ":
            rows[title] = value
            last = title
        else:
            rows[last] += f" {line.strip()}"
    return rows


def test_everything_is_shown(tmp_path):
    bundle = make(tmp_path / "bundle", recipe="fast")
    rows = table(format_bundle(bundle.folder, bundle.folder))
    files = [path for path in bundle.folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    digest = hashlib.sha256((bundle.folder / "bundle.json").read_bytes()).hexdigest()
    assert rows == {
        "kind": "one model, one network a fold",
        "dataset": "Dataset007_Liver",
        "configuration": "3d_fullres",
        "recipe": "fast",
        "channels": "2: T1w, CT",
        "labels": "3: left 1, right 2, lesion 7",
        "folds": "fold_0, fold_3",
        "checkpoints": "final, best",
        "network": "residual_unet, 3 stages, 124 parameters",
        "features": "4, 6, 8",
        "patch size": "8 x 16 x 12 voxels, axes K, I, J",
        "spacing": "2 x 0.9 x 1.25 mm",
        "normalisation": "zscore (inside the non-zero mask), ct",
        "mirroring": "axes K, J",
        "postprocessing": "none",
        "written by": f"medseg {bundle.manifest.medseg_version}",
        "size": f"{size / 1000:.3g} kB in {len(files)} files",
        "checksum": f"sha256 of bundle.json, which holds those of the other files: {digest}",
    }


def test_many_labels_are_shortened(tmp_path):
    labels = {"background": 0, **{f"structure number {n}": n for n in range(1, 105)}}
    spec = DatasetSpec(name="Many", channels=("T1w", "CT"), labels=labels)
    bundle = make(tmp_path / "bundle", spec=spec)
    text = format_bundle(bundle.folder, bundle.folder)
    assert table(text)["labels"].startswith("104: structure number 1 1, structure number 2 2, ")
    assert table(text)["labels"].endswith("structure number 24 24, and 80 more")
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_regions_show_their_values(tmp_path):
    labels = {"background": 0, "whole": (1, 2), "core": 2}
    spec = DatasetSpec(
        name="Brain", channels=("T1w", "CT"), labels=labels, regions_class_order=(1, 2)
    )
    bundle = make(tmp_path / "bundle", spec=spec, semantics=Semantics(activation="sigmoid"))
    rows = table(format_bundle(bundle.folder, bundle.folder))
    assert rows["labels"] == "2 regions: whole 1+2, core 2"
    assert rows["mirroring"] == "none"


@pytest.mark.parametrize(
    ("values", "orientation", "expected"),
    [
        ({"average": "probabilities"}, "canonical", "probabilities are averaged, not logits"),
        ({"normalise_first": False}, "canonical", "normalised after resampling"),
        ({"accumulator": "float16"}, "canonical", "in exact mode sums are float16"),
        ({"gaussian_peak": 10.0}, "canonical", "the largest weight in a tile is 10"),
        ({"label_resize": "threshold"}, "canonical", "a label needs half a voxel"),
        ({"least_std": "added"}, "canonical", "1e-8 is added to standard deviations"),
        ({"keeps_slices": True}, "canonical", "the spacing across slices stays"),
        ({"separate_by": "image"}, "canonical", "the image's grid tells"),
        ({"previous": "labels_uncropped"}, "canonical", "hands over its label map"),
        (
            {"resample_image": Resampling(method="interpolate", separate="never")},
            "canonical",
            "images are resampled linearly, no axis alone",
        ),
        (
            {"resample_labels": Resampling(method="none")},
            "canonical",
            "label maps are resampled not at all",
        ),
        (
            {"resample_result": Resampling(order=3, separate="always")},
            "canonical",
            "results are resampled by splines of order 3, the coarsest axis always alone",
        ),
        ({}, "stored_sitk", "images are taken as they are stored"),
    ],
)
def test_unusual_semantics_are_put_into_words(tmp_path, values, orientation, expected):
    bundle = make(tmp_path / "bundle", semantics=Semantics(**values), orientation=orientation)
    rows = table(format_bundle(bundle.folder, bundle.folder))
    assert expected in rows["semantics"]
    assert ";" not in rows["semantics"]


def test_every_field_of_the_semantics_has_words(tmp_path):
    """A field that is added must be shown: those shown elsewhere stand here by name."""
    from medseg.report import bundles

    elsewhere = {"activation", "mirror_axes", "swap_axes"}
    known = elsewhere | set(bundles._WORDS) | set(bundles._RESAMPLED)
    assert known == set(Semantics.model_fields)


def test_labels_that_change_places_are_told(tmp_path):
    semantics = Semantics(mirror_axes=(0, 1, 2), swap_axes=(1,))
    bundle = make(tmp_path / "bundle", semantics=semantics)
    rows = table(format_bundle(bundle.folder, bundle.folder))
    assert rows["mirroring"] == "axes K, I, J; along I left and right labels change places"


def test_postprocessing_is_put_into_words(tmp_path):
    steps = (
        KeepLargest(structures=("left", "right"), connectivity=1),
        KeepLargest(structures=("lesion",), below_mm3=20.5),
        RemoveSmall(structures=("left", "right", "lesion"), min_ml=0.25, together=False),
        FillHoles(structures=("left",), max_ml=2),
        FillHoles(structures=("right",)),
    )
    bundle = make(tmp_path / "bundle", postprocessing=Postprocessing(steps=steps))
    found = table(format_bundle(bundle.folder, bundle.folder))["postprocessing"]
    assert found.split("; ") == [
        "of left and right together every piece but the largest is removed (connected by faces)",
        "of lesion every piece but the largest that has less than 20.5 mm3 is removed "
        "(connected by faces, edges or corners)",
        "pieces of left, right and lesion each below 0.25 ml are removed "
        "(connected by faces, edges or corners)",
        "holes of up to 2 ml in left are filled",
        "holes in right are filled",
    ]


def test_a_cascade_shows_both_stages(tmp_path):
    first = make(tmp_path / "first", name="3d_lowres")
    bundle = make(
        tmp_path / "second", name="second", previous_stage="3d_lowres", previous=first.folder
    )
    whole, member = format_bundle(bundle.folder, bundle.folder).split("\n\n")
    assert table(whole)["kind"] == "cascade: the second stage, after 3d_lowres"
    assert table(whole)["size"].endswith(" in 14 files")
    assert member.startswith(f"member previous of {bundle.folder}\n")
    assert table(member)["configuration"] == "3d_lowres"
    assert table(member)["size"].endswith(" in 7 files")


def test_a_chain_shows_its_parts(tmp_path):
    member = make(tmp_path / "organs")
    parts = (
        ChainPart(member="organs", values={1: 5, 2: 6}),
        ChainPart(member="organs", values={7: 8}),
    )
    labels = {"background": 0, "a": 5, "b": 6, "c": 8}
    chain = write_chain(
        tmp_path / "chain",
        spec=DatasetSpec(name="Body", channels=("T1w", "CT"), labels=labels),
        chain=Chain(spacing=(1.5, 1.5, 3), parts=parts),
        members={"organs": member.folder},
    )
    whole, below = format_bundle(chain.folder, chain.folder).split("\n\n")
    rows = table(whole)
    assert rows["kind"] == "chain of 1 bundle"
    assert rows["labels"] == "3: a 5, b 6, c 8"
    assert rows["spacing"] == "1.5 x 1.5 x 3 mm, for all parts"
    assert rows["merged"] == (
        "label maps of organs (2 labels), organs (1 label); "
        "where two find something, the later one stays"
    )
    assert rows["size"].endswith(" in 9 files")
    assert table(below)["dataset"] == "Dataset007_Liver"


def test_an_ensemble_shows_its_weights(tmp_path):
    members = {name: make(tmp_path / name).folder for name in ("first", "second")}
    weights = {"first": 2.0, "second": 0.5}
    bundle = write_ensemble(tmp_path / "both", members=members, weights=weights)
    whole, *below = format_bundle(bundle.folder, bundle.folder).split("\n\n")
    assert table(whole)["kind"] == "ensemble of 2 bundles"
    assert table(whole)["averaged"] == "probabilities, with the weights first 2, second 0.5"
    assert [block.split(" of ")[0] for block in below] == ["member first", "member second"]


def test_a_damaged_bundle_is_refused(tmp_path):
    bundle = make(tmp_path / "bundle")
    (bundle.folder / "plans.json").write_text("{}")
    with pytest.raises(BundleError, match=r"plans\.json: sha256"):
        format_bundle(bundle.folder, bundle.folder)
