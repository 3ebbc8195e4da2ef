"""The command line: its options, its exit status, and what it prints."""

from __future__ import annotations

import shutil

import pytest
import typer

import medseg as package
from medseg.cli import main as main_module
from medseg.cli.main import app
from medseg.io.read import read_segmentation

OPTIONS = {
    "": {"--workspace", "--debug", "--version"},
    "demo": {"-o", "--output", "--device"},
    "dataset": set(),
    "dataset init": {"FOLDER", "--images", "--segmentations"},
    "dataset check": {"DATASET", "--fix", "--workers"},
    "fingerprint": {"DATASET", "--skip-bad", "--workers"},
    "plan": {
        "DATASET",
        "[DATASET]",
        "[OTHER]",
        "--plans",
        "--gpu-memory",
        "--target-spacing",
        "--from",
        "--replan",
    },
    "preprocess": {"DATASET", "-c", "--configuration", "--plans", "--workers"},
    "plan-and-preprocess": {
        "DATASET",
        "-c",
        "--configuration",
        "--plans",
        "--gpu-memory",
        "--target-spacing",
        "--from",
        "--replan",
        "--skip-bad",
        "--workers",
    },
    "train": {
        "DATASET",
        "CONFIG",
        "FOLD",
        "--plans",
        "--recipe",
        "--set",
        "--name",
        "--budget",
        "--epochs",
        "--iterations",
        "--seed",
        "--seeds",
        "--init-from",
        "--validate-every",
        "--track",
        "--gpus",
        "--extend",
        "--device",
        "--validate-only",
        "--restart",
    },
    "export": {
        "MODEL",
        "--format",
        "-o",
        "--output",
        "--folds",
        "--checkpoint",
        "--trust-code",
    },
    "predict": {
        "-i",
        "--input",
        "-o",
        "--output",
        "-m",
        "--model",
        "--weights",
        "--folds",
        "--checkpoint",
        "--tta",
        "--step",
        "--save",
        "--previous-stage",
        "--parts",
        "--overwrite",
        "--no-postprocess",
        "--max-memory",
        "--max-vram",
        "--device",
        "--exact",
        "--trust-code",
    },
    "serve": {
        "MODEL",
        "--host",
        "--port",
        "--token-file",
        "--max-upload",
        "--max-waiting",
        "--max-disk",
        "--keep",
        "--folds",
        "--checkpoint",
        "--tta",
        "--max-memory",
        "--device",
        "--trust-code",
    },
    "evaluate": {"PRED", "REF", "-o", "--output"},
    "crossval": {"DATASET", "CONFIG", "--plans", "--recipe", "--name"},
    "config": set(),
    "config list": set(),
    "config copy": {"NAME", "FILE"},
    "import": set(),
    "import nnunet": {
        "PATH",
        "-o",
        "--output",
        "--list",
        "--task",
        "--configuration",
        "--trainer",
        "--plans",
        "--folds",
        "--dataset-json",
        "--label-resize",
    },
    "import totalsegmentator": {"FOLDER", "-o", "--output", "--list", "--task"},
    "bundle": set(),
    "bundle pack": {"MODEL", "-o", "--output"},
    "bundle unpack": {"FILE", "-o", "--output"},
    "bundle join": {"MODEL", "-o", "--output", "--weights"},
    "bundle info": {"MODEL"},
    "models": set(),
    "models list": {"WORD"},
    "models info": {"NAME"},
    "models fetch": {"NAME", "-o", "--output", "--from", "--configuration"},
}
"""Every option and argument there is. A new one belongs into the layout first, then here."""


def walk(command, path=""):
    """Yield the path and the options of a command and of all below it."""
    names = set()
    for parameter in command.params:
        is_option = bool(parameter.opts and parameter.opts[0].startswith("-"))
        names |= set(parameter.opts) if is_option else {parameter.metavar}
    yield path, names - {"--help", "-h"}
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, f"{path} {name}".strip())


def test_options_are_frozen():
    assert dict(walk(typer.main.get_command(app))) == OPTIONS


def test_every_option_and_command_is_explained():
    def check(command, path):
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", ""), f"{path} {parameter.name}"
        for name, child in getattr(command, "commands", {}).items():
            check(child, f"{path} {name}")

    check(typer.main.get_command(app), "medseg")


@pytest.mark.parametrize("command", [path for path in OPTIONS if path not in ("config", "dataset")])
def test_help_of_every_command(medseg, command):
    ran = medseg(*command.split(), "--help")
    assert ran.status == 0
    assert ran.err == ""
    assert "Usage:" in ran.out


def test_version(medseg):
    ran = medseg("--version")
    assert (ran.status, ran.out) == (0, f"medseg {package.__version__}\n")


def test_plan_show(medseg, workspace):
    ran = medseg("plan", "show", 7, workspace=workspace)
    assert ran.status == 0
    assert "3d_fullres" in ran.out
    again = medseg("plan", 7, workspace=workspace)
    assert again.out == ran.out
    ran = medseg("plan", "sow", 7, workspace=workspace)
    assert ran.status == 2
    assert "plan show 7" in ran.err


def test_config_list_and_copy(medseg, tmp_path):
    ran = medseg("config", "list")
    assert ran.status == 0
    assert "default" in ran.out
    target = tmp_path / "mine.yaml"
    assert medseg("config", "copy", "default", target).status == 0
    assert "epochs: 1000" in target.read_text()
    ran = medseg("config", "copy", "default", target)
    assert ran.status == 2
    assert "is there already" in ran.err
    assert medseg("config", "copy", "defalt", tmp_path / "x.yaml").status == 2
    assert medseg("config", "copy", "default", tmp_path / "x.txt").status == 2
    assert [path.name for path in tmp_path.glob("*.*")] == ["mine.yaml"]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A workspace with one fold trained by the command line."""
    from medseg.cli.main import run

    work = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(prepared / "work", work)
    command = ["--workspace", str(work), "train", "7", "3d_fullres", "0", "--iterations", "2"]
    for change in ("network.base_features=4", "network.max_features=8", "precision=fp32"):
        command += ["--set", change]
    assert run([*command, "--set", "validation_iterations=1", "--name", "small"]) == 0
    return work / "datasets/Dataset007_Tiny/runs/nnunet__3d_fullres__small"


def test_train_predict_evaluate(medseg, trained, prepared, tmp_path):
    raw, out = prepared / "Dataset007_Tiny", tmp_path / "out"
    ran = medseg("predict", "-i", raw / "imagesTr", "-o", out, "-m", trained, "--tta", "none")
    assert ran.status == 0, ran.err
    cases = [f"case_{number}" for number in range(1, 5)]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{c}.nii.gz" for c in cases]
    ran = medseg("evaluate", out, raw / "labelsTr", "-o", tmp_path / "metrics.json")
    assert ran.status == 0, ran.err
    assert "organ" in ran.out
    assert "lesion" in ran.out
    assert (tmp_path / "metrics.json").is_file()


def test_a_bad_case_does_not_stop_the_others(medseg, trained, prepared, tmp_path):
    """One garbage file among four cases: three results, status 1, the case named."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(prepared / "Dataset007_Tiny/imagesTr", images)
    (images / "case_2_0001.nii.gz").write_bytes(b"no image")
    ran = medseg("predict", "-i", images, "-o", out, "-m", trained, "--tta", "none")
    assert ran.status == 1
    assert "case_2" in ran.out + ran.err
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [
        "case_1.nii.gz",
        "case_3.nii.gz",
        "case_4.nii.gz",
    ]
    assert read_segmentation(out / "case_1.nii.gz").array.shape == (21, 23, 16)


def remove_channel(images):
    (images / "case_3_0001.nii.gz").unlink()


def remove_all(images):
    for path in images.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "options", "expected"),
    [
        (remove_channel, [], ["case 'case_3'", "0000", "0001 (FLAIR)", "nothing was predicted"]),
        (remove_all, [], ["holds no image", "CASE_0000.nii.gz"]),
        (None, ["--folds", "3"], ["3", "fold_0"]),
        (None, ["--checkpoint", "bestt"], ["bestt", "best", "final"]),
        (None, ["--tta", "flip"], ["Did you mean 'flips'?"]),
        (None, ["--step", "0"], ["step is 0.0", "(0, 1]"]),
        (None, ["--device", "gpu"], ["'gpu'", "cpu"]),
    ],
)
def test_bad_prediction_is_refused(medseg, trained, prepared, tmp_path, spoil, options, expected):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(prepared / "Dataset007_Tiny/imagesTr", images)
    if spoil is not None:
        spoil(images)
    ran = medseg("predict", "-i", images, "-o", out, "-m", trained, *options)
    assert ran.status == 2
    assert ran.err.count("Error") == 1, ran.err
    assert [text for text in expected if text not in ran.err] == [], ran.err
    assert not out.exists()


def test_no_model_is_refused(medseg, prepared, tmp_path):
    images = prepared / "Dataset007_Tiny/imagesTr"
    ran = medseg("predict", "-i", images, "-o", tmp_path / "out", "-m", tmp_path)
    assert ran.status == 2
    assert "bundle.json" in ran.err
    assert not (tmp_path / "out").exists()


def test_crossval_lists_missing_folds(medseg, trained):
    root = trained.parents[3]
    ran = medseg("crossval", 7, "3d_fullres", "--name", "small", workspace=root)
    assert ran.status == 2
    assert "not trained: fold_1, fold_2, fold_3" in ran.err
    assert not (trained / "crossval").exists()


def test_debug_shows_where_an_error_comes_from(medseg, tmp_path, caplog):
    ran = medseg("--debug", "fingerprint", tmp_path / "nowhere")
    assert ran.status == 2
    assert any(record.exc_info for record in caplog.records)


def test_interruption_is_status_130(medseg, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "app", interrupted)
    ran = medseg("config", "list")
    assert ran.status == 130
    assert ran.err == "Interrupted.\n"


def test_option_errors_are_those_of_the_library():
    """What `run` catches is the base of everything typer raises for a wrong option."""
    assert issubclass(typer.BadParameter, main_module._OPTION_ERROR)
    assert main_module._OPTION_ERROR is not Exception
    assert isinstance(main_module._OPTION_ERROR.exit_code, int)
