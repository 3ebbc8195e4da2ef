"""Models of nnU-Net as bundles: equal to the original, from folders, trees and zips."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg
from medseg.api.importing import import_nnunet, imported, list_nnunet
from medseg.api.models import resolve
from medseg.bundles.bundle import read_bundle
from medseg.errors import BundleError, ConfigError
from medseg.models.weights import load_weights
from medseg.schema.plans import Architecture
from tests.interop.nnunet.v2_folders import make_state, write_model

FIXTURES = Path(__file__).parents[3] / "shared/data/nnunet_models"
NAMES = ("v1_iso", "v1_two", "v2_aniso", "v2_resreg", "v2_casc")
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="models of nnU-Net with what they predicted are not here"
)
TRAINED = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def images(name):
    return sorted((FIXTURES / name / "in").glob("*.nii.gz"))


def predict(path, name, mode, **options):
    before = FIXTURES / name / "prev/case.nii.gz"
    model = medseg.load(path, mode=mode, device="cpu")
    return model.predict(
        images(name), previous_stage=before if before.is_file() else None, **options
    )


def original(name):
    """Return probabilities (L, I, J, K), of version 1 in the cropped box alone, and labels."""
    out = FIXTURES / name / "out"
    if name.startswith("v1"):
        probabilities = np.load(out / "resampled.npy")
    else:
        probabilities = np.load(out / "case.npz")["probabilities"]
    return probabilities.transpose(0, 3, 2, 1), np.asarray(nib.load(out / "case.nii.gz").dataobj)


def in_box(found):
    """Return the probabilities where the image was not cropped away, in image axes."""
    order = [found.record.axes.index(axis) for axis in range(3)]
    return found.probabilities[(slice(None), *(slice(*found.record.box[d]) for d in order))]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    return {name: import_nnunet(FIXTURES / name, root / name).folder for name in NAMES}


@needs_fixtures
class TestEquality:
    @pytest.mark.parametrize("name", NAMES)
    def test_exact_mode_equals_the_original(self, bundles, name):
        found = predict(bundles[name], name, "exact", probabilities=True, tta="flips")
        expected, labels = original(name)
        own = in_box(found) if name.startswith("v1") else found.probabilities
        assert own.shape == expected.shape
        assert np.abs(own - expected).max() <= 1e-5
        np.testing.assert_array_equal(found.segmentation, labels)

    @pytest.mark.parametrize("name", NAMES)
    def test_by_default_hardly_any_label_differs(self, bundles, name):
        found = predict(bundles[name], name, "default", tta="flips")
        _, labels = original(name)
        assert (found.segmentation != labels).mean() <= 0.001

    def test_probabilities_are_on_the_grid_of_the_input(self, bundles):
        found = predict(bundles["v2_aniso"], "v2_aniso", "exact", probabilities=True, tta="none")
        assert found.probabilities.shape == (3, *nib.load(images("v2_aniso")[0]).shape)

    def test_a_second_stage_alone_asks_for_what_the_first_found(self, bundles):
        model = medseg.load(bundles["v2_casc"], device="cpu")
        with pytest.raises(medseg.ConfigError, match=r"needs what '3d_lowres' finds"):
            model.predict(images("v2_casc"))


@needs_fixtures
class TestPlaces:
    def test_nothing_but_json_and_safetensors_remains(self, bundles):
        for folder in bundles.values():
            endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
            assert endings == {".json", ".safetensors"}

    @pytest.fixture
    def tree(self, tmp_path):
        """Results of two versions in one tree, as nnU-Net lays them out."""
        root = tmp_path / "results"
        shutil.copytree(FIXTURES / "v2_aniso", root / "Dataset900_X" / TRAINED)
        old = root / "nnUNet/3d_fullres/Task017_Organs/nnUNetTrainerV2__nnUNetPlansv2.1"
        shutil.copytree(FIXTURES / "v1_iso", old)
        return root

    def test_a_tree_is_listed_and_one_model_chosen(self, tree, tmp_path):
        found = list_nnunet(tree)
        assert [(m.version, m.dataset, m.configuration) for m in found] == [
            (2, "Dataset900_X", "3d_fullres"),
            (1, "Task017_Organs", "3d_fullres"),
        ]
        with pytest.raises(BundleError, match=r"2 models fit one model.*"):
            import_nnunet(tree, tmp_path / "bundle")
        bundle = import_nnunet(tree, tmp_path / "bundle", task="17", folds=["1"])
        assert bundle.manifest.folds == ("fold_1",)
        assert bundle.spec.name == "Task017_Organs"

    def test_a_zip_gives_the_bundle_that_its_folder_gives(self, tree, tmp_path):
        archive = tmp_path / "models.zip"
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted(tree.rglob("*")):
                out.write(path, path.relative_to(tree))
        assert len(list_nnunet(archive)) == 2
        packed = import_nnunet(archive, tmp_path / "packed", task="Dataset900_X")
        plain = import_nnunet(tree, tmp_path / "plain", task="Dataset900_X")
        assert packed.manifest.semantics == plain.manifest.semantics
        both = [load_weights(bundle.weights("fold_0")) for bundle in (packed, plain)]
        assert both[0].keys() == both[1].keys()
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "models.zip", "packed", "plain", "results",
        ]  # fmt: skip

    def test_labels_of_version_1_are_named_by_a_dataset_json(self, tmp_path):
        names = {"modality": {"0": "CT", "1": "T2"}, "labels": {"0": "bg", "1": "liver", "2": "a"}}
        (tmp_path / "dataset.json").write_text(json.dumps(names))
        bundle = import_nnunet(
            FIXTURES / "v1_iso", tmp_path / "bundle", dataset_json=tmp_path / "dataset.json"
        )
        assert list(bundle.spec.labels) == ["background", "liver", "a"]
        with pytest.raises(BundleError, match=r"brings its own dataset\.json"):
            import_nnunet(
                FIXTURES / "v2_aniso", tmp_path / "b", dataset_json=tmp_path / "dataset.json"
            )

    def test_how_labels_are_resampled_can_be_chosen(self, tmp_path):
        bundle = import_nnunet(FIXTURES / "v1_iso", tmp_path / "b", label_resize="threshold")
        assert bundle.manifest.semantics.label_resize == "threshold"


@needs_fixtures
class TestOnTheFly:
    def test_a_folder_is_imported_once(self, tmp_path, caplog):
        caplog.set_level("INFO", logger="medseg")
        first = resolve(FIXTURES / "v2_aniso", tmp_path / "work")
        assert first.parent == tmp_path / "work/imported"
        assert len(first.name) == 64
        before = (first / "bundle.json").stat().st_mtime_ns
        assert resolve(FIXTURES / "v2_aniso", tmp_path / "work") == first
        assert (first / "bundle.json").stat().st_mtime_ns == before
        assert sum("importing" in record.message for record in caplog.records) == 1

    def test_other_content_is_another_model(self, tmp_path):
        copy = tmp_path / "model"
        shutil.copytree(FIXTURES / "v2_aniso", copy)
        first = imported(copy, tmp_path / "cache")
        dataset = json.loads((copy / "dataset.json").read_text())
        dataset["labels"] = {"background": 0, "one": 1, "two": 2}
        (copy / "dataset.json").write_text(json.dumps(dataset))
        second = imported(copy, tmp_path / "cache")
        assert second != first
        assert list(read_bundle(second).spec.labels) == ["background", "one", "two"]

    def test_load_takes_the_folder_itself(self, tmp_path):
        model = medseg.load(
            FIXTURES / "v2_aniso", device="cpu", folds=[0], workspace=tmp_path / "work"
        )
        assert model.folds == ("fold_0",)


def test_a_name_that_is_nothing_says_what_would_be_one(tmp_path):
    with pytest.raises(BundleError, match=r"no such file or folder, nor the name of a public"):
        resolve("nowhere", tmp_path)


def test_a_public_model_that_was_not_fetched_says_how(tmp_path):
    with pytest.raises(BundleError, match=r"Run 'medseg models fetch Task004"):
        resolve("Task004_Hippocampus", tmp_path)


def test_a_folder_without_any_model_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(BundleError, match=r"no model there \(a folder with notes.txt\)"):
        resolve(tmp_path, tmp_path / "work")


@needs_fixtures
class TestCache:
    """What is imported on the fly is as new as the files it came from."""

    def stages(self, tmp_path, first=True):
        root = tmp_path / "Dataset900_X"
        second = root / "nnUNetTrainer__nnUNetPlans__3d_cascade_fullres"
        if not second.exists():
            shutil.copytree(FIXTURES / "v2_casc", second)
        if first:
            name = "nnUNetTrainer__nnUNetPlans__3d_lowres"
            architecture = make_architecture_of(FIXTURES / "v2_casc/plans.json")
            plans = json.loads((FIXTURES / "v2_casc/plans.json").read_text())
            dataset = json.loads((FIXTURES / "v2_casc/dataset.json").read_text())
            states = {f"fold_{n}": make_state(architecture, seed=n) for n in (0, 1)}
            write_model(root / name, plans=plans, dataset=dataset, states=states, name="3d_lowres")
        return second

    def test_a_first_stage_that_appears_is_taken(self, tmp_path):
        alone = resolve(self.stages(tmp_path, first=False), tmp_path / "work")
        assert read_bundle(alone).previous is None
        both = resolve(self.stages(tmp_path), tmp_path / "work")
        assert read_bundle(both).previous is not None
        assert resolve(self.stages(tmp_path, first=False), tmp_path / "work") == both

    def test_a_zip_brings_the_first_stage_whatever_it_is_called(self, tmp_path):
        self.stages(tmp_path)
        archive = tmp_path / "both.zip"
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted((tmp_path / "Dataset900_X").rglob("*")):
                out.write(path, path.relative_to(tmp_path))
        name = "3d_cascade_fullres"
        packed = import_nnunet(archive, tmp_path / "bundle", configuration=name)
        assert packed.previous.configuration_name == "3d_lowres"

    def test_names_of_labels_that_appear_are_taken(self, tmp_path):
        task = tmp_path / "3d_fullres/Task017_Organs"
        model = task / "nnUNetTrainerV2__nnUNetPlansv2.1"
        shutil.copytree(FIXTURES / "v1_iso", model)
        before = read_bundle(resolve(model, tmp_path / "work")).spec.labels
        names = {"modality": {"0": "CT", "1": "T2"}, "labels": {"0": "bg", "1": "liver", "2": "a"}}
        (task / "dataset.json").write_text(json.dumps(names))
        after = read_bundle(resolve(model, tmp_path / "work")).spec.labels
        assert "liver" not in before
        assert list(after) == ["background", "liver", "a"]

    def test_every_fold_can_be_asked_for(self, tmp_path):
        model = tmp_path / "model"
        states = {"fold_0": make_state(), "fold_all": make_state(seed=5)}
        write_model(model, states=states)
        folder = resolve(model, tmp_path / "work")
        assert medseg.load(folder, device="cpu").folds == ("fold_0",)
        assert medseg.load(folder, device="cpu", folds="all").folds == ("all",)

    def test_what_is_left_of_a_bundle_is_replaced(self, tmp_path):
        folder = resolve(FIXTURES / "v2_aniso", tmp_path / "work")
        (folder / "bundle.json").unlink()
        assert resolve(FIXTURES / "v2_aniso", tmp_path / "work") == folder
        assert read_bundle(folder).folder == folder


def make_architecture_of(path):
    """Return the network of a plans file's 3d_fullres, in medseg's terms."""
    arguments = json.loads(path.read_text())["configurations"]["3d_fullres"]["architecture"]
    arguments = arguments["arch_kwargs"]
    return Architecture(
        kind="plain_unet",
        features=arguments["features_per_stage"],
        kernel_sizes=arguments["kernel_sizes"],
        strides=arguments["strides"],
        blocks_encoder=arguments["n_conv_per_stage"],
        blocks_decoder=arguments["n_conv_per_stage_decoder"][::-1],
    )


@needs_fixtures
def test_a_misspelt_rule_leaves_an_earlier_bundle_alone(tmp_path):
    bundle = import_nnunet(FIXTURES / "v2_aniso", tmp_path / "bundle")
    with pytest.raises(ConfigError, match=r"label_resize is 'Threshold'.*threshold"):
        import_nnunet(FIXTURES / "v2_aniso", tmp_path / "bundle", label_resize="Threshold")
    assert read_bundle(bundle.folder) == bundle


@needs_fixtures
def test_exact_mode_mirrors_as_the_original_however_long_it_takes(bundles, monkeypatch):
    monkeypatch.setattr("medseg.infer.member.CPU_FLIP_VOXELS", 1)
    found = predict(bundles["v2_aniso"], "v2_aniso", "exact")
    _, labels = original("v2_aniso")
    np.testing.assert_array_equal(found.segmentation, labels)
