"""`export --format nnunet`: from a bundle to a folder, and what the command prints."""

from __future__ import annotations

import json

import pytest
import torch

from medseg.api.export import export
from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.cli.main import run
from medseg.errors import BundleError, ConfigError
from medseg.models.weights import load_weights
from medseg.schema.bundle import Semantics
from medseg.schema.training_cases import Spread, TrainingCases


@pytest.fixture(scope="module")
def bundle(make, tmp_path_factory):
    return make.bundle(tmp_path_factory.mktemp("nnunet") / "bundle", folds=2, mirror_axes=(0, 1))


@pytest.fixture
def cascade(make, tmp_path):
    """A cascade of one fold with the checkpoints final and best in its second stage."""
    fine = make.plans().configurations["tiny"].model_copy(update={"previous_stage": "tiny"})
    plans = make.plans().model_copy(update={"configurations": {"fine": fine}})
    entries = {
        name: make.foreign(plans=plans, configuration="fine", folds=folds).weights["fold_0"][
            "final"
        ]
        for name, folds in (("final", ("fold_0",)), ("best", ("fold_1", "fold_0")))
    }
    return write_bundle(
        tmp_path / "cascade",
        spec=make.spec(),
        plans=plans,
        configuration="fine",
        weights={"fold_0": entries},
        semantics=Semantics(),
        previous=make.bundle(tmp_path / "before", folds=2),
    ).folder


def network(folder, fold, checkpoint="final"):
    path = folder / f"fold_{fold}/checkpoint_{checkpoint}.pth"
    return torch.load(path, weights_only=True)["network_weights"]


def test_weights_are_those_of_the_bundle_fold_by_fold(bundle, tmp_path):
    exported = export(bundle, tmp_path / "out", format="nnunet")
    assert exported.files == (
        "dataset.json", "fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth", "plans.json",
    )  # fmt: skip
    assert exported.channels == ("T1w", "CT")
    for fold in (0, 1):
        own = load_weights(read_bundle(bundle).weights(f"fold_{fold}"))
        found = network(tmp_path / "out", fold)
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def test_some_folds_of_the_model_alone(bundle, tmp_path):
    assert export(bundle, tmp_path / "out", format="nnunet", folds=[1]).stages[0].folds == ("1",)
    with pytest.raises(BundleError, match="no weights for fold_7"):
        export(bundle, tmp_path / "other", format="nnunet", folds=[7])
    with pytest.raises(BundleError, match="no checkpoint 'best'"):
        export(bundle, tmp_path / "other", format="nnunet", checkpoint="best")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_holds_something_else_is_refused_first(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not an earlier export \(notes\.txt\)"):
        export(tmp_path / "no_model", tmp_path, format="nnunet")


def test_number_of_training_cases_is_passed_on(make, bundle, tmp_path):
    export(bundle, tmp_path / "out", format="nnunet")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["numTraining"] == 0
    own = read_bundle(bundle)
    size = Spread(min=1, percentile_05=1, median=1, percentile_95=1, max=1)
    folder = write_bundle(
        tmp_path / "bundle",
        spec=own.spec,
        plans=own.plans,
        configuration="tiny",
        weights={"fold_0": {"final": own.weights("fold_0")}},
        semantics=own.manifest.semantics,
        training=TrainingCases(num_cases=23, spacing=(size, size, size), channels=()),
    ).folder
    export(folder, tmp_path / "out", format="nnunet")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["numTraining"] == 23


def test_a_cascade_predicts_with_its_best_weights_after_the_final_ones_of_the_stage_before(
    cascade, tmp_path
):
    exported = export(cascade, tmp_path / "out", format="nnunet", checkpoint="best")
    assert [stage.checkpoint for stage in exported.stages] == [
        "checkpoint_final.pth", "checkpoint_best.pth",
    ]  # fmt: skip
    assert [stage.folds for stage in exported.stages] == [("0",), ("0",)]
    own = read_bundle(cascade)
    for stage, source, name in (
        ("tiny", own.previous, "final"),
        ("fine", own, "best"),
    ):
        found = network(tmp_path / f"out/nnUNetTrainer__tiny__{stage}", 0, name)
        for tensor, wanted in load_weights(source.weights("fold_0", name)).items():
            assert torch.equal(found[tensor], wanted)


def test_networks_from_outside_are_refused_whether_trusted_or_not(make, tmp_path, monkeypatch):
    (tmp_path / "outside_export.py").write_text(
        "from torch import nn\n"
        "def Tiny(num_inputs, num_logits):\n"
        "    return nn.Conv3d(num_inputs, num_logits, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plans = make.plans(architecture=make.architecture("outside_export:Tiny"))
    folder = make.bundle(tmp_path / "bundle", plans=plans)
    for trust in (False, True):
        with pytest.raises(BundleError, match=r"architecture\.kind is 'outside_export:Tiny'"):
            export(folder, tmp_path / "out", format="nnunet", trust_code=trust)


class TestCommand:
    def test_prints_files_and_how_to_predict(self, bundle, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(["export", str(bundle), "--format", "nnunet", "-o", str(out)]) == 0
        text = capsys.readouterr().out
        for part in (
            "fold_1/checkpoint_final.pth",
            "plans.json",
            "medseg_export.json",
            "CASE_0000.nii.gz ... CASE_0001.nii.gz in INPUT for T1w, CT",
            f"nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {out} -f 0 1\n",
        ):
            assert part in text
        assert "Note" not in text
        assert all(len(line) <= 80 for line in text.splitlines() if str(out) not in line)

    def test_prints_a_command_for_each_stage_of_a_cascade(self, cascade, tmp_path, capsys):
        out = tmp_path / "out"
        arguments = ["export", str(cascade), "--format", "nnunet", "-o", str(out)]
        assert run([*arguments, "--checkpoint", "best"]) == 0
        text = capsys.readouterr().out
        first, second = (line for line in text.splitlines() if "nnUNetv2_predict" in line)
        assert first.endswith(f"-i INPUT -o STAGE_1 -m {out}/nnUNetTrainer__tiny__tiny -f 0")
        assert second.endswith(
            f"-i INPUT -o OUTPUT -m {out}/nnUNetTrainer__tiny__fine -f 0 "
            "-chk checkpoint_best.pth -prev_stage_predictions STAGE_1"
        )
        assert "Note: fine: nnU-Net hands the label map of tiny over" in text

    def test_a_second_stage_alone_says_whose_label_maps_it_takes(self, cascade, tmp_path, capsys):
        own = read_bundle(cascade)
        alone = write_bundle(
            tmp_path / "alone",
            spec=own.spec,
            plans=own.plans,
            configuration="fine",
            weights={"fold_0": {"final": own.weights("fold_0")}},
            semantics=Semantics(previous="labels"),
        ).folder
        out = tmp_path / "out"
        assert run(["export", str(alone), "--format", "nnunet", "-o", str(out)]) == 0
        text = capsys.readouterr().out
        assert f"-m {out} -f 0 -prev_stage_predictions STAGE_1\n" in text
        assert "STAGE_1 holds the label maps of tiny, CASE.nii.gz." in text

    def test_what_cannot_be_expressed_has_status_2(self, make, tmp_path, capsys):
        plans = make.plans(architecture=make.architecture("mednext_s"))
        folder = make.bundle(tmp_path / "bundle", plans=plans)
        out = tmp_path / "out"
        assert run(["export", str(folder), "--format", "nnunet", "-o", str(out)]) == 2
        error = capsys.readouterr().err
        assert "bundle: 1 thing that nnU-Net v2 has no counterpart of" in error
        assert "architecture.kind is 'mednext_s'" in error
        assert not out.exists()
