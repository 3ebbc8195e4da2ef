"""`export`: what is written, what is refused, and what the command prints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from medseg.api.export import FORMATS, export
from medseg.cli.main import run
from medseg.errors import BundleError, ConfigError
from medseg.interop import onnx as onnx_module
from medseg.interop import runtime
from medseg.schema.base import read
from medseg.schema.exported import ExportedModel

FILES = ["model.json", "network_fold_0.onnx", "network_fold_1.onnx", "predict.py"]


@pytest.fixture(scope="module")
def bundle(make, tmp_path_factory):
    return make.bundle(tmp_path_factory.mktemp("export") / "bundle", folds=2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_holds_networks_description_and_runtime(bundle, tmp_path):
    out = tmp_path / "deep" / "out"
    returned = export(bundle, out, format="onnx")
    assert names(out) == FILES
    assert names(out.parent) == ["out"]
    model = read(ExportedModel, out / "model.json")
    assert model == returned
    for network in model.networks:
        content = (out / network.file).read_bytes()
        assert network.sha256 == hashlib.sha256(content).hexdigest()
        assert 0 < network.max_probability_difference <= 1e-4
    assert (out / "predict.py").read_text() == Path(runtime.__file__).read_text()
    assert set(model.exported_with) == {"torch", "onnx", "onnxscript", "onnxruntime"}


def test_some_folds_can_be_exported_and_an_export_is_replaced_whole(bundle, tmp_path):
    export(bundle, tmp_path / "out", format="onnx")
    (tmp_path / "out" / "__pycache__").mkdir()
    export(bundle, tmp_path / "out", format="onnx", folds=[1])
    assert names(tmp_path / "out") == ["model.json", "network_fold_1.onnx", "predict.py"]
    assert names(tmp_path) == ["out"]
    (tmp_path / "empty").mkdir()
    export(bundle, tmp_path / "empty", format="onnx", folds=[1])
    assert len(names(tmp_path / "empty")) == 3


class TestRefused:
    def refuse(self, error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            export(*arguments, **{"format": "onnx", **options})

    def test_folder_that_holds_something_else(self, bundle, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        self.refuse(ConfigError, r"is not an earlier export \(notes\.txt\)", bundle, tmp_path)
        self.refuse(ConfigError, "is a file", bundle, tmp_path / "notes.txt")
        (tmp_path / "model.json").write_text('{"kind": "another program"}')
        self.refuse(ConfigError, "is not an earlier export", bundle, tmp_path)
        assert names(tmp_path) == ["model.json", "notes.txt"]

    def test_export_beside_which_results_lie(self, bundle, tmp_path):
        out = tmp_path / "out"
        export(bundle, out, format="onnx")
        (out / "anna.nii.gz").write_bytes(b"a result")
        match = r"holds more than an earlier export \(anna\.nii\.gz\)"
        self.refuse(ConfigError, match, bundle, out)
        assert names(out) == ["anna.nii.gz", *FILES]

    def test_failure_in_the_middle_leaves_what_was_there(self, bundle, tmp_path, monkeypatch):
        out = tmp_path / "out"
        export(bundle, out, format="onnx")
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        found = iter([1e-6, 2e-4])
        monkeypatch.setattr(onnx_module, "probability_difference", lambda *_: next(found))
        self.refuse(BundleError, r"fold_1: .* differ from those of torch by 2\.0e-04", bundle, out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        monkeypatch.setattr(onnx_module, "probability_difference", lambda *_: float("nan"))
        self.refuse(BundleError, "differ from those of torch by nan", bundle, tmp_path / "new")
        assert names(tmp_path) == ["out"]

    def test_unknown_format(self, bundle, tmp_path):
        match = (
            f"format is 'onxx'; expected one of: {', '.join(sorted(FORMATS))}. Did you mean 'onnx'"
        )
        self.refuse(ConfigError, match, bundle, tmp_path / "out", format="onxx")

    def test_no_model_no_such_fold(self, bundle, tmp_path):
        self.refuse(BundleError, "no model there", tmp_path, tmp_path / "out")
        self.refuse(BundleError, "no weights for fold_7", bundle, tmp_path / "out", folds=[7])
        self.refuse(
            BundleError, "no checkpoint 'best'", bundle, tmp_path / "out", checkpoint="best"
        )
        assert names(tmp_path) == []

    def test_network_from_outside_without_trust(self, make, tmp_path, monkeypatch):
        (tmp_path / "outside.py").write_text(
            "from torch import nn\n"
            "def Tiny(num_inputs, num_logits):\n"
            "    return nn.Sequential(nn.Conv3d(num_inputs, 4, 3, padding=1), nn.ReLU(),\n"
            "                         nn.Conv3d(4, num_logits, 1))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        plans = make.plans(architecture=make.architecture("outside:Tiny"))
        folder = make.bundle(tmp_path / "bundle", plans=plans)
        out = tmp_path / "out"
        self.refuse(BundleError, r"bundle: the network is 'outside:Tiny'.*trust", folder, out)
        assert not out.exists()
        written = export(folder, out, format="onnx", trust_code=True)
        assert written.networks[0].max_probability_difference <= 1e-4

    @pytest.mark.parametrize(
        ("semantics", "orientation", "match"),
        [
            (
                {"average": "probabilities", "normalise_first": False, "least_std": "added"},
                "canonical",
                "semantics.average is probabilities, expected logits; semantics.normalise_first is "
                "False, expected True; semantics.least_std is added, expected floor",
            ),
            ({"accumulator": "float16"}, "stored_sitk", "ONNX: orientation is stored_sitk"),
        ],
        ids=["semantics", "orientation"],
    )
    def test_predictions_put_together_otherwise(
        self, make, tmp_path, semantics, orientation, match
    ):
        from medseg.bundles.bundle import read_bundle, write_bundle
        from medseg.schema.bundle import Semantics

        source = read_bundle(make.bundle(tmp_path / "bundle"))
        folder = write_bundle(
            tmp_path / "other",
            spec=source.spec,
            plans=source.plans,
            configuration="tiny",
            weights={"fold_0": {"final": source.weights("fold_0")}},
            semantics=Semantics(**semantics),
            orientation=orientation,
        ).folder
        self.refuse(BundleError, match, folder, tmp_path / "out")

    def test_cascade(self, make, tmp_path, monkeypatch):
        from medseg.bundles.bundle import write_bundle
        from medseg.schema.bundle import Semantics

        plans = make.plans()
        tiny = plans.configurations["tiny"]
        fine = tiny.model_copy(update={"previous_stage": "tiny"})
        plans = plans.model_copy(update={"configurations": {"tiny": tiny, "fine": fine}})
        before = make.bundle(tmp_path / "before", plans=plans)
        cascade = write_bundle(
            tmp_path / "cascade",
            spec=make.spec(),
            plans=plans,
            configuration="fine",
            weights={"fold_0": {"final": before / "weights/fold_0.safetensors"}},
            semantics=Semantics(),
            previous=before,
        )
        self.refuse(BundleError, "is a cascade; only models of one", cascade.folder, tmp_path / "o")


class TestCommand:
    def test_prints_files_difference_and_how_to_run(self, bundle, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(["export", str(bundle), "--format", "onnx", "-o", str(out)]) == 0
        text = capsys.readouterr().out
        worst = max(
            network["max_probability_difference"]
            for network in json.loads((out / "model.json").read_text())["networks"]
        )
        for part in (*FILES, f"{worst:.1e} in all, allowed 1e-04", "T1w, CT", "OUTPUT.nii.gz"):
            assert part in text
        assert all(len(line) <= 80 for line in text.splitlines() if str(out) not in line)

    def test_errors_have_status_2(self, bundle, tmp_path, capsys):
        out = str(tmp_path / "out")
        assert run(["export", str(bundle), "--format", "torch", "-o", out]) == 2
        assert "format is 'torch'; expected one of: nnunet, onnx" in capsys.readouterr().err
        assert run(["export", str(bundle), "--format", "onnx", "-o", out, "--folds", "4"]) == 2
        assert "no weights for fold_4" in capsys.readouterr().err

    def test_stored_postprocessing_is_said_to_be_left_out(self, make, tmp_path, capsys):
        from medseg.bundles.bundle import read_bundle, write_bundle
        from medseg.schema.postprocessing import KeepLargest, Postprocessing

        source = read_bundle(make.bundle(tmp_path / "bundle"))
        steps = Postprocessing(steps=(KeepLargest(structures=("lesion",)),))
        folder = write_bundle(
            tmp_path / "with",
            spec=source.spec,
            plans=source.plans,
            configuration="tiny",
            weights={"fold_0": {"final": source.weights("fold_0")}},
            semantics=source.manifest.semantics,
            postprocessing=steps,
        ).folder
        out = tmp_path / "out"
        assert run(["export", str(folder), "--format", "onnx", "-o", str(out)]) == 0
        assert "does not do the postprocessing stored" in capsys.readouterr().out
        assert read(ExportedModel, out / "model.json").postprocessing == steps
