"""What `medseg train` starts on several GPUs: the same command, in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

from medseg.api import launch, side_by_side, training
from medseg.cli import processes
from medseg.cli.main import app
from medseg.cli.options import settings
from medseg.cli.processes import command_line, train_elsewhere
from medseg.errors import ConfigError

PLACES = ("Dataset007_Liver", "3d_fullres", "cv")
OPTIONS = {
    "plans": "resenc_l",
    "recipe": "configs/my own.yaml",
    "set": ["optimizer.lr=0.001", "loss.name=dice"],
    "name": "trial",
    "budget": "30m",
    "epochs": None,
    "iterations": None,
    "seed": 0,
    "seeds": 3,
    "init_from": Path("models/liver"),
    "validate_every": 5,
    "track": ["tensorboard", "mlflow"],
    "extend": False,
    "validate_only": False,
    "restart": True,
    "workspace": Path("elsewhere"),
    "progress": True,
    "started": 12.5,
}


def parsed(words):
    """Return the parameters the program reads from a command line."""
    command = typer.main.get_command(app)
    context = command.make_context("medseg", list(words))
    name, command, rest = command.resolve_command(
        context, [*context._protected_args, *context.args]
    )
    return {**context.params, **command.make_context(name, rest, parent=context).params}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(settings, "workspace", Path("elsewhere"))


@pytest.fixture
def free(monkeypatch):
    """A function that sets which GPUs are free."""

    def give(*devices):
        monkeypatch.setattr(side_by_side, "free_devices", lambda: list(devices))

    return give


@pytest.fixture
def started(monkeypatch):
    """What was started, instead of starting it."""
    found = {}

    def run_folds(folds, devices, command_of, **options):
        found.update(folds=folds, devices=devices, command_of=command_of, **options)

    def fake_launch(command, count, **options):
        found.update(command=command, count=count, **options)
        return found.get("status", 0)

    monkeypatch.setattr(side_by_side, "run_folds", run_folds)
    monkeypatch.setattr(launch, "launch", fake_launch)
    monkeypatch.setattr(
        training, "folds_of", lambda *_, **__: (Path("run"), ["fold_0", "fold_1", "fold_2"], None)
    )
    return found


def test_every_option_reaches_the_process():
    """But for the places and what differs on purpose, no parameter of the command is forgotten."""
    words = command_line((*PLACES[:2], "2"), {**OPTIONS, "device": "cuda:1"})
    assert words[:3] == [sys.executable, "-m", "medseg"]
    found = parsed(words[3:])
    own = {"set": "changes"}
    given = {
        own.get(k, k): v
        for k, v in OPTIONS.items()
        if k not in ("progress", "started", "neighbours")
    }
    expected = {**given, "dataset": PLACES[0], "config": PLACES[1], "fold": "2", "gpus": None}
    assert found == {**expected, "device": "cuda:1", "debug": False, "version": None}


def test_folds_get_a_gpu_each_and_their_number(free, started):
    free("cuda:0", "cuda:3")
    assert train_elsewhere(PLACES, OPTIONS, gpus=None, device="auto") == "folds"
    assert started["devices"] == ["cuda:0", "cuda:3"]
    assert started["folds"] == ["fold_0", "fold_1", "fold_2"]
    assert started["logs"] == Path("run/logs")
    found = parsed(started["command_of"]("fold_2", "cuda:3")[3:])
    assert (found["fold"], found["device"], found["gpus"]) == ("2", "cuda:3", None)


def test_folds_take_no_more_gpus_than_asked_for(free, started):
    free("cuda:0", "cuda:1", "cuda:2")
    assert train_elsewhere(PLACES, OPTIONS, gpus=2, device="auto") == "folds"
    assert started["devices"] == ["cuda:0", "cuda:1"]


def test_the_first_stage_of_a_cascade_is_trained_side_by_side_before(free, monkeypatch):
    """Otherwise every fold would begin by training all of it."""
    free("cuda:0", "cuda:1")
    begun = []

    def folds_of(dataset, config, **_):
        before = "3d_lowres" if config == "3d_cascade_fullres" else None
        return Path(config), ["fold_0", "fold_1"], before

    def run_folds(folds, devices, command_of, *, logs, environment):
        found = parsed(command_of("fold_1", "cuda:1")[3:])
        begun.append((found["config"], found["extend"], environment["MEDSEG_NEIGHBOURS"]))

    monkeypatch.setattr(training, "folds_of", folds_of)
    monkeypatch.setattr(side_by_side, "run_folds", run_folds)
    places = (PLACES[0], "3d_cascade_fullres", "cv")
    train_elsewhere(places, {**OPTIONS, "extend": True}, gpus=None, device="auto")
    assert begun == [("3d_lowres", False, "2"), ("3d_cascade_fullres", True, "2")]


@pytest.mark.parametrize("devices", [(), ("cuda:1",)])
def test_without_several_free_gpus_folds_come_one_after_another(free, started, devices):
    free(*devices)
    assert train_elsewhere(PLACES, OPTIONS, gpus=None, device="auto") == "nothing"
    assert started == {}


def test_one_fold_on_several_gpus_is_one_command(free, started):
    free("cuda:1", "cuda:2", "cuda:3")
    places = (*PLACES[:2], "0")
    assert train_elsewhere(places, OPTIONS, gpus=2, device="auto") == "all"
    assert (started["count"], started["devices"]) == (2, ["cuda:1", "cuda:2"])
    found = parsed(started["command"][3:])
    assert (found["fold"], found["device"], found["gpus"]) == ("0", "auto", None)


def test_the_status_of_the_processes_is_that_of_the_command(free, started):
    free("cuda:0", "cuda:1")
    started["status"] = 143
    with pytest.raises(typer.Exit) as caught:
        train_elsewhere((*PLACES[:2], "0"), OPTIONS, gpus=2, device="auto")
    assert caught.value.exit_code == 143


@pytest.mark.parametrize(
    ("fold", "gpus", "device", "changes"),
    [
        ("0", None, "auto", {}),
        ("all", 1, "auto", {}),
        ("cv", None, "cuda:1", {}),
        ("cv", None, "cpu", {}),
        ("cv", None, "auto", {"validate_only": True}),
    ],
)
def test_otherwise_this_process_trains(monkeypatch, fold, gpus, device, changes):
    monkeypatch.setattr(side_by_side, "free_devices", lambda: pytest.fail("looked for GPUs"))
    options = {**OPTIONS, **changes}
    assert train_elsewhere((*PLACES[:2], fold), options, gpus=gpus, device=device) == "nothing"


def test_a_process_that_was_started_starts_no_others(monkeypatch, free):
    free("cuda:0", "cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_elsewhere((*PLACES[:2], "0"), OPTIONS, gpus=2, device="auto") == "nothing"


def test_too_few_gpus_and_a_device_beside_gpus_are_refused(free):
    free("cuda:3")
    with pytest.raises(ConfigError, match="gpus is 2, but free CUDA devices are: cuda:3"):
        train_elsewhere((*PLACES[:2], "0"), OPTIONS, gpus=2, device="auto")
    with pytest.raises(ConfigError, match="gpus is 2, but device is 'cuda:0'"):
        train_elsewhere((*PLACES[:2], "0"), OPTIONS, gpus=2, device="cuda:0")


def test_a_lone_process_is_joined_with_nobody(monkeypatch):
    with processes.joined_processes("cpu") as device:
        assert device == "cpu"


def test_prediction_uses_the_processors_it_may(monkeypatch):
    """The quota of a container counts; a number the user has set stands."""
    import torch

    from medseg.cli import processes
    from medseg.execute import resources

    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(resources, "num_cpus", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    processes.use_cpus()
    assert seen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    processes.use_cpus()
    assert seen == [3]
    assert torch.get_num_threads() == before
