"""A run that is killed goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import medseg
from medseg.models.weights import load_weights

ITERATIONS = 24
CHANGES = ["ema=0.9", "checkpoint_minutes=0.001", "iterations_per_epoch=5"]


def checkpoints(fold):
    return sorted(path for path in (fold / "checkpoints").glob("[0-9]*") if path.is_dir())


def newest(fold):
    """Return the steps of the newest checkpoint, 0 if there is none."""
    found = checkpoints(fold)
    return int(found[-1].name) if found else 0


def run_until(command, fold, number, rng, log):
    """Run a command until it has gone beyond the checkpoint it found, then send it a signal."""
    before = newest(fold)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            while process.poll() is None and newest(fold) <= before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            assert process.poll() is None, f"ended before it was hit:\n{log.read_text()}"
            process.send_signal(number)
            return process.wait(timeout=60)
        finally:
            process.kill()


def is_own(key):
    """Return whether a value of the journal differs from run to run: times, number of process."""
    return key.endswith("seconds") or key == "session"


def journal(fold):
    """Return the rows of a journal as far as they are the same in every run."""
    rows = [json.loads(line) for line in (fold / "journal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not is_own(key)} for row in rows]


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        same = tensor.dtype == other[name].dtype and torch.equal(
            tensor.contiguous().reshape(-1).view(torch.uint8),
            other[name].contiguous().reshape(-1).view(torch.uint8),
        )
        assert same, name


@pytest.fixture
def options(workspace, recipe):
    return {"recipe": recipe, "workspace": workspace, "iterations": ITERATIONS, "device": "cpu"}


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_ends_as_one_left_alone(options, workspace, tmp_path):
    """Killed while it trains, asked to stop while it trains, it goes on exactly where it was.

    Weights, moving average, optimiser, random states, journal: everything but times.
    """
    whole = medseg.train("Dataset004_Tiny", "3d_fullres", 0, set=CHANGES, name="whole", **options)
    command = [sys.executable, "-m", "medseg", "--workspace", workspace, "train"]
    command += ["Dataset004_Tiny", "3d_fullres", "0", "--name", "hit", "--device", "cpu"]
    command += ["--recipe", options["recipe"], "--iterations", str(ITERATIONS)]
    command += [part for change in CHANGES for part in ("--set", change)]
    fold = workspace / "datasets/Dataset004_Tiny/runs/nnunet__3d_fullres__hit/fold_0"
    rng, log = random.Random(3), tmp_path / "log.txt"
    assert run_until(command, fold, signal.SIGKILL, rng, log) == -signal.SIGKILL
    killed_at = newest(fold)
    assert run_until(command, fold, signal.SIGTERM, rng, log) == 128 + signal.SIGTERM
    assert ITERATIONS > newest(fold) > killed_at > 0
    again = medseg.train("Dataset004_Tiny", "3d_fullres", 0, set=CHANGES, name="hit", **options)
    assert again.path == fold.parent
    reference = whole.path / "fold_0"
    for name in ("final", "best"):
        weights = [load_weights(path / f"weights/{name}.safetensors") for path in (reference, fold)]
        assert_same_tensors(*weights)
    last = [checkpoints(path)[-1] for path in (reference, fold)]
    assert [path.name for path in last] == [f"{ITERATIONS:08d}"] * 2
    assert_same_tensors(*(load_weights(path / "tensors.safetensors") for path in last))
    assert journal(fold) == journal(reference)
    assert json.loads((fold / "run.json").read_text())["iterations"] == ITERATIONS
    assert not [*fold.rglob(".*.part"), *fold.glob("lock")]
    assert again.metrics["fold_0"].foreground_mean == whole.metrics["fold_0"].foreground_mean


def test_a_run_killed_when_its_weights_had_just_appeared_is_finished(options):
    """What comes after the final weights, such as the last entries of run.json, is not lost."""
    options = {**options, "set": CHANGES, "name": "end", "iterations": 3}
    fold = medseg.train("Dataset004_Tiny", "3d_fullres", 0, **options).path / "fold_0"
    record = json.loads((fold / "run.json").read_text())
    weights = load_weights(fold / "weights/final.safetensors")
    unfinished = {**record, "iterations": None, "epochs": None, "seconds_to_last_step": None}
    (fold / "run.json").write_text(json.dumps(unfinished))
    medseg.train("Dataset004_Tiny", "3d_fullres", 0, **options)
    after = json.loads((fold / "run.json").read_text())
    assert_same_tensors(weights, load_weights(fold / "weights/final.safetensors"))
    assert (after["iterations"], after["epochs"]) == (3, record["epochs"])
    assert after["seconds_to_last_step"] >= record["seconds_to_last_step"]
