"""Files of strangers through the whole import: one clear error, nothing run, nothing left."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import torch

import medseg
from medseg.api.importing import import_nnunet
from medseg.cli.main import run
from medseg.errors import BundleError
from tests.interop.nnunet import v1_folders
from tests.interop.nnunet.v2_folders import changed, make_plans, write_model

CHECKPOINT = "fold_0/checkpoint_final.pth"


class Reduced:
    """Pickles as a call of something."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def marker(tmp_path):
    """A file that no import may make."""
    return tmp_path / "outside" / "it-was-run"


@pytest.fixture
def model(tmp_path, marker):
    marker.parent.mkdir()
    return write_model(tmp_path / "model")


def resaved(model, **changes):
    """Write the checkpoint again, with values that a safe reader would not build."""
    path = model / CHECKPOINT
    content = torch.load(path, weights_only=False)
    torch.save({**content, **changes}, path)
    return model


def refused(model, tmp_path, marker, words):
    """Import by function and by command: both end with the words and leave nothing."""
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(BundleError) as caught:
        import_nnunet(model, tmp_path / "bundle")
    for word in words:
        assert word in str(caught.value)
    assert run(["import", "nnunet", str(model), "-o", str(tmp_path / "bundle")]) == 2
    with pytest.raises(BundleError):
        medseg.load(model, device="cpu", workspace=tmp_path / "work")
    assert not marker.exists()
    left = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(left) == sorted(p for p in before if (tmp_path / p).is_file())


class TestPickles:
    def test_they_would_run_if_they_were_loaded(self, model, marker):
        """The control: the attack works where nobody defends."""
        resaved(model, extra=Reduced(os.system, f"touch {marker}"))
        torch.load(model / CHECKPOINT, weights_only=False)
        assert marker.exists()

    def test_system_by_reduce(self, model, tmp_path, marker):
        resaved(model, extra=Reduced(os.system, f"touch {marker}"))
        refused(model, tmp_path, marker, [f"{os.system.__module__}.system", CHECKPOINT])

    def test_nested_getattr(self, model, tmp_path, marker):
        inner = Reduced(getattr, Reduced(__import__, "os"), "system")
        resaved(model, init_args={"configuration": inner})
        refused(model, tmp_path, marker, ["__builtin__.", CHECKPOINT])

    def test_eval(self, model, tmp_path, marker):
        resaved(model, trainer_name=Reduced(eval, f"open({str(marker)!r}, 'w')"))
        refused(model, tmp_path, marker, ["__builtin__.eval"])

    def test_a_call_hidden_behind_torch(self, model, tmp_path, marker):
        hidden = Reduced(torch.serialization.load, str(marker))
        resaved(model, extra=hidden)
        refused(model, tmp_path, marker, ["torch.serialization.load"])

    def test_plans_of_version_1(self, tmp_path, marker):
        marker.parent.mkdir()
        folder = v1_folders.write_model(tmp_path / "old")
        path = next(folder.rglob("*.model.pkl"))
        content = pickle.loads(path.read_bytes())
        content["plans"]["more"] = Reduced(os.system, f"touch {marker}")
        path.write_bytes(pickle.dumps(content))
        refused(folder, tmp_path, marker, [f"{os.system.__module__}.system"])

    def test_a_postprocessing_pickle_is_not_even_opened(self, model, tmp_path, marker):
        folder = model / "crossval_results_folds_0"
        folder.mkdir()
        attack = pickle.dumps(Reduced(os.system, f"touch {marker}"))
        (folder / "postprocessing.pkl").write_bytes(attack)
        import_nnunet(model, tmp_path / "bundle")
        assert not marker.exists()


class TestTensors:
    def declared(self, model, change):
        """Write the checkpoint's zip again with another pickle, its storages as they are."""
        path = model / CHECKPOINT
        with zipfile.ZipFile(path) as archive:
            files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(name, change(content) if name.endswith("data.pkl") else content)

    def test_a_tensor_of_two_gigabytes_with_nothing_behind_it(self, model, tmp_path, marker):
        tiny = torch.zeros(1).expand(512, 1024, 1024)
        content = torch.load(model / CHECKPOINT, weights_only=False)
        weights = {**content["network_weights"], "decoder.seg_layers.1.weight": tiny}
        resaved(model, network_weights=weights)
        assert (model / CHECKPOINT).stat().st_size < 10**6
        refused(model, tmp_path, marker, [CHECKPOINT])

    def test_a_storage_larger_than_the_file(self, model, tmp_path, marker):
        count = torch.load(model / CHECKPOINT)["network_weights"]["decoder.seg_layers.1.bias"]
        small = b"K" + bytes([count.numel()]) + b"t"
        self.declared(model, lambda content: content.replace(small, b"J\xff\xff\xff\x7ft"))
        refused(model, tmp_path, marker, [CHECKPOINT])

    def test_numbers_that_are_none(self, model, tmp_path, marker):
        content = torch.load(model / CHECKPOINT, weights_only=False)
        weights = {name: tensor.clone() for name, tensor in content["network_weights"].items()}
        for name in weights:
            if name.startswith("encoder.stages.0.0.convs.0.conv.weight"):
                weights[name][0] = float("nan")
        resaved(model, network_weights=weights)
        refused(model, tmp_path, marker, ["encoder.stages.0.0.convs.0"])

    def test_a_truncated_file(self, model, tmp_path, marker):
        path = model / CHECKPOINT
        path.write_bytes(path.read_bytes()[:-1000])
        refused(model, tmp_path, marker, [CHECKPOINT])

    def test_a_legacy_file_with_another_magic(self, model, tmp_path, marker):
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        magic = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
        assert buffer.getvalue().count(magic) == 1
        (model / CHECKPOINT).write_bytes(buffer.getvalue().replace(magic, b"x" * len(magic)))
        refused(model, tmp_path, marker, [CHECKPOINT])

    def test_text_in_place_of_a_checkpoint(self, model, tmp_path, marker):
        (model / CHECKPOINT).write_text("<html>not found</html>")
        refused(model, tmp_path, marker, [CHECKPOINT])


class TestPlans:
    @pytest.mark.parametrize(
        ("path", "value", "word"),
        [
            ("configurations.3d_fullres.patch_size.0", float("nan"), "patch_size"),
            ("configurations.3d_fullres.patch_size.0", -8, "patch_size"),
            ("configurations.3d_fullres.patch_size.0", 10**9, "patch_size"),
            ("configurations.3d_fullres.spacing.1", 0, "spacing"),
            ("transpose_forward", [0, 0, 1], "transpose_forward"),
            (
                "configurations.3d_fullres.architecture.network_class_name",
                "os.system",
                "network_class_name",
            ),
        ],
    )
    def test_values_without_sense(self, tmp_path, marker, path, value, word):
        marker.parent.mkdir()
        folder = write_model(tmp_path / "model", plans=changed(make_plans(), path, value))
        refused(folder, tmp_path, marker, [word, "plans.json"])

    def test_a_name_of_the_dataset_that_leads_elsewhere(self, tmp_path, marker):
        marker.parent.mkdir()
        plans = make_plans(dataset_name="../../outside/it-was-run")
        folder = write_model(tmp_path / "model", plans=plans)
        import_nnunet(folder, tmp_path / "bundle")
        assert list(marker.parent.iterdir()) == []

    def test_nesting_without_end(self, model, tmp_path, marker):
        (model / "plans.json").write_text("[" * 100_000 + "]" * 100_000)
        refused(model, tmp_path, marker, ["plans.json"])


class TestZips:
    @pytest.fixture
    def packed(self, model, tmp_path):
        """Return what writes the model's zip with one more entry."""

        def write(entry=None, content=b"", compression=zipfile.ZIP_STORED):
            archive = tmp_path / "model.zip"
            with zipfile.ZipFile(archive, "w") as out:
                for path in sorted(model.rglob("*")):
                    if path.is_file():
                        out.write(path, f"Dataset007_Pancreas/a__b__c/{path.relative_to(model)}")
                if entry is not None:
                    out.writestr(entry, content, compression)
            return archive

        return write

    def test_a_good_one_is_imported(self, packed, tmp_path):
        assert import_nnunet(packed(), tmp_path / "bundle").manifest.folds == ("fold_0",)

    @pytest.mark.parametrize(
        "name", ["../outside/it-was-run", "/tmp/it-was-run", "a/../../outside/it-was-run", "C:\\a"]
    )
    def test_a_path_that_leads_out(self, packed, tmp_path, marker, name):
        refused(packed(name, b"x"), tmp_path, marker, ["model.zip"])

    def test_a_link(self, packed, tmp_path, marker):
        entry = zipfile.ZipInfo("Dataset007_Pancreas/a__b__c/fold_1")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        refused(packed(entry, str(marker.parent)), tmp_path, marker, ["model.zip", "fold_1"])

    def test_a_bomb(self, packed, tmp_path, marker):
        archive = packed("Dataset007_Pancreas/a__b__c/fold_0/debug.json")
        with (
            zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as out,
            out.open("Dataset007_Pancreas/a__b__c/fold_1/checkpoint_final.pth", "w") as file,
        ):
            for _ in range(1100):
                file.write(bytes(2**20))
        assert archive.stat().st_size < 4 * 10**6
        refused(archive, tmp_path, marker, ["model.zip"])

    def test_a_truncated_one(self, packed, tmp_path, marker):
        archive = packed()
        archive.write_bytes(archive.read_bytes()[:-100])
        refused(archive, tmp_path, marker, ["model.zip"])


def test_an_error_in_the_middle_leaves_an_earlier_bundle_as_it_was(model, tmp_path, marker):
    good = import_nnunet(model, tmp_path / "bundle")
    before = json.loads((good.folder / "bundle.json").read_text())
    resaved(model, extra=Reduced(os.system, f"touch {marker}"))
    with pytest.raises(BundleError):
        import_nnunet(model, tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle/bundle.json").read_text()) == before
    assert medseg.load(Path(tmp_path / "bundle"), device="cpu").folds == ("fold_0",)
