"""The benchmarks of training judge what they measure, and leave out what is not to be measured."""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"
NAMES = ("peer", "watch", "train", "kill", "hippocampus", "nnunet_train")


@pytest.fixture
def bench(monkeypatch):
    """Import a benchmark as it is when it is run: its folder is searched first."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: importlib.import_module(name)
    for name in NAMES:
        sys.modules.pop(name, None)


def steps(train, seconds, *, wait=0.01, busy=None, arithmetic="bfloat16, compiled"):
    """Return what a run took."""
    return train.Steps(
        seconds=tuple(seconds),
        shares={"wait": wait, "augment": None, "forward": None, "backward": None},
        before_seconds=30.0,
        arithmetic=arithmetic,
        peak_bytes=10**9,
        gpu_peak_bytes=None,
        gpu_busy=busy,
    )


def plans(*, patch=(40, 56, 40), features=(32, 64, 128, 256)):
    """Return nnU-Net's and medseg's plans as far as they are looked at."""
    same = {"patch_size": list(patch), "batch_size": 7}
    return tuple(
        {"configurations": {"3d_fullres": {**same, "architecture": architecture}}}
        for architecture in (
            {"arch_kwargs": {"features_per_stage": list(features)}},
            {"features": list(features)},
        )
    )


def test_steps_are_compared_only_where_both_sides_train_the_same(bench):
    train = bench("train")
    theirs, ours = plans()
    train.check_plans(theirs, ours)
    with pytest.raises(SystemExit, match=r"medseg planned .*\[32, 64, 128, 320\]"):
        train.check_plans(theirs, plans(features=(32, 64, 128, 320))[1])
    with pytest.raises(SystemExit, match=r"nnU-Net planned .*\[56, 40, 40\]"):
        train.check_plans(plans(patch=(56, 40, 40))[0], ours)


def test_the_first_epoch_and_validation_are_not_timed(bench):
    train, use = bench("train"), bench("watch").Use(1000.0, 50.0, (), None)
    rows = [
        {"iteration": 2, "seconds": 90.0, "elapsed_seconds": 95.0, "wait_seconds": 40.0},
        {"iteration": 4, "seconds": 9.0, "elapsed_seconds": 104.0, "wait_seconds": 0.25},
        {"iteration": 7, "seconds": 13.0, "elapsed_seconds": 116.0, "wait_seconds": 0.75},
    ]
    rows[2]["validate_seconds"] = 2.0
    record = {"precision": "float32", "compiled": True}
    said = "going on\nnetwork compiled in 31 s: 3.1 s a step, 4.0 s without compiling\n"
    found = train.read_ours(rows, record, said, use)
    assert found.seconds == (4.5, pytest.approx(11 / 3))
    assert found.shares["wait"] == pytest.approx(1 / 20)
    assert found.shares["forward"] is None
    assert found.before_seconds == 95.0
    assert found.arithmetic.startswith("float32, compiled; network compiled in 31 s")
    assert found.peak_bytes is None
    assert found.gpu_busy is None


def test_the_gpu_is_judged_in_the_timed_steps_alone(bench):
    train, watch = bench("train"), bench("watch")
    samples = [watch.Sample(time, None, busy, 2) for time, busy in ((5, 0.0), (16, 0.9), (19, 1.0))]
    use = watch.Use(0.0, 25.0, (*samples, watch.Sample(24, None, 0.0, 7)), 1)
    found = {
        "seconds": [1.0, 3.0],
        "wait_seconds": 1.0,
        "window": [15.0, 20.0],
        "precision": "float16",
        "is_compiled": True,
    }
    theirs = train.read_theirs(found, use)
    assert theirs.gpu_busy == pytest.approx(0.95)
    assert theirs.shares["wait"] == 0.25
    assert theirs.gpu_peak_bytes == 6


@pytest.mark.parametrize(
    ("device", "ours", "wait", "busy", "verdicts"),
    [
        ("cpu", [1.0, 9.0, 1.0], 0.049, None, [True, True]),
        ("cpu", [1.01], 0.01, None, [False, True]),
        ("cpu", [1.0], 0.05, None, [True, False]),
        ("cpu", [1.0], None, None, [True, False]),
        ("cuda", [1.4], 0.01, 0.9, [True, True, True]),
        ("cuda", [1.41], 0.01, 0.89, [False, True, False]),
        ("cuda", [1.0], 0.01, None, [True, True, False]),
    ],
)
def test_steps_are_judged_by_ratio_wait_and_gpu(bench, capsys, device, ours, wait, busy, verdicts):
    """What was not recorded is short; the median counts, not a slow step."""
    train = bench("train")
    mine, peer = steps(train, ours, wait=wait, busy=busy), steps(train, [2.8, 2.8, 9.9])
    assert train.judge_steps([mine], [peer], device) == verdicts
    out = capsys.readouterr().out
    assert ("not measured: step and busy share of a GPU" in out) == (device == "cpu")


def test_arithmetic_that_the_limit_is_not_for_is_said(bench, capsys):
    train = bench("train")
    ours = steps(train, [1.0], arithmetic="float32, not compiled")
    train.judge_steps([ours], [steps(train, [3.0])], "cpu")
    assert "this run was not in bf16" in capsys.readouterr().out


def test_memory_of_all_processes_counts_and_cores_are_kept_to(bench, tmp_path):
    """A child's memory adds to its parent's; what they share by forking counts once."""
    watch = bench("watch")
    script = (
        "import os, time\n"
        "shared = bytearray(os.urandom(2**20)) * 150\n"
        "child = os.fork()\n"
        "own = bytearray(os.urandom(2**20)) * 100\n"
        "print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "time.sleep(60 if child else 61)\n"
    )
    log, looks = tmp_path / "log.txt", []
    use = watch.watch(
        [sys.executable, "-c", script],
        cores=1,
        log=log,
        is_enough=lambda: looks.append(0) or log.read_text().count("1\n") == 2,
    )
    assert 350e6 < use.peak_bytes < 450e6
    assert 0 < use.seconds < 30
    assert len({line for line in log.read_text().splitlines() if line.startswith("[")}) == 1


def test_a_command_that_fails_ends_the_benchmark(bench, tmp_path):
    watch = bench("watch")
    command = [sys.executable, "-c", "import sys; sys.exit('no such plans')"]
    with pytest.raises(SystemExit, match="no such plans"):
        watch.watch(command, cores=1, log=tmp_path / "log.txt")


@pytest.mark.parametrize(
    ("text", "found"),
    [("37, 1024\n", (0.37, 2**30)), ("[N/A], 12\n", None), ("", None), ("no devices", None)],
)
def test_what_the_driver_says_is_read(bench, text, found):
    assert bench("watch").read_answer(text) == found


def fold(hippocampus, dice, *, length="8m", seed=0, fold=0, seconds=479.0):
    """Return a trained fold."""
    return hippocampus.Trained(length, seed, fold, dice, {"Anterior": dice}, 700, seconds, "fp32")


@pytest.mark.parametrize(
    ("length", "dice", "seconds", "verdicts"),
    [
        ("8m", [0.860, 0.866, 0.869], 480.0, [True, True]),
        ("8m", [0.860, 0.866, 0.8685], 480.1, [False, False]),
        ("30m", [0.878] * 3, 1799.0, [True, True]),
        ("30m", [0.8779] * 3, 1799.0, [True, False]),
        ("8m", [0.9, 0.9], 479.0, [True]),
        ("12m", [0.9] * 3, 700.0, [True]),
        ("700 steps", [0.9] * 3, 9999.0, []),
    ],
)
def test_dice_is_judged_by_the_mean_over_three_seeds(
    bench, capsys, length, dice, seconds, verdicts
):
    """Fewer seeds, or another length, are not judged, and that is said."""
    hippocampus = bench("hippocampus")
    runs = [
        fold(hippocampus, value, length=length, seed=seed, seconds=seconds)
        for seed, value in enumerate(dice)
    ]
    assert hippocampus.judge_folds(length, runs, is_cv=False) == verdicts
    assert ("not judged: Dice" in capsys.readouterr().out) == (len(verdicts) < 2)


def test_other_folds_are_no_seeds(bench):
    hippocampus = bench("hippocampus")
    runs = [fold(hippocampus, 0.9, fold=number) for number in range(3)]
    assert hippocampus.judge_folds("8m", runs, is_cv=False) == [True]


def test_all_folds_are_judged_by_their_pooled_mean(bench):
    hippocampus = bench("hippocampus")
    assert hippocampus.judge_crossval("10m", [0.860, 0.871]) == [True]
    assert hippocampus.judge_crossval("10m", [0.8649]) == [False]
    assert hippocampus.judge_crossval("8m", [0.8649]) == []


def test_a_finished_run_is_known_by_its_validation(bench, tmp_path):
    """One that was killed while it trained or was validated goes on."""
    is_finished = bench("hippocampus").is_finished
    (tmp_path / "validation").mkdir()
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").write_text('{"iterations": null}')
    (tmp_path / "validation/metrics.json").write_text("{}")
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").write_text('{"iterations": 700}')
    os.utime(tmp_path / "run.json", (2000, 2000))
    os.utime(tmp_path / "validation/metrics.json", (1000, 1000))
    assert not is_finished(tmp_path)  # the scores are of the weights before
    os.utime(tmp_path / "validation/metrics.json", (3000, 3000))
    assert is_finished(tmp_path)


def test_every_changed_bit_is_found_and_times_are_not(bench):
    differences = bench("kill").differences
    weights = torch.tensor([1.0, -0.0, float("nan")])
    one = {"network": {"w": weights}, "epoch": 3, "loss_sum": 0.5, "length": {"elapsed": 1.0}}
    other = {"network": {"w": weights.clone()}, "epoch": 3, "loss_sum": 0.5}
    assert differences(one, other) == {"/epoch": True, "/loss_sum": True, "/network/w": True}
    other["network"] = {"w": torch.tensor([1.0, 0.0, float("nan")])}
    assert differences(one, other)["/network/w"] is False
    other["network"] = {"w": weights.double()}
    assert differences(one, other)["/network/w"] is False
    assert differences(one, {**one, "epoch": 3.0})["/epoch"] is False
    assert differences(one, {**one, "more": [None]})["/more/0"] is False


def test_moments_cover_the_run_and_follow_the_seed(bench):
    kill = bench("kill")
    moments = kill.drawn(random.Random(4), 400, 300, 0.5)
    assert moments == kill.drawn(random.Random(4), 400, 300, 0.5)
    found = [moment.step for moment in moments]
    assert found == sorted(found)
    assert min(found) < 10
    assert max(found) > 280
    assert sum(step < 147.5 for step in found) == pytest.approx(200, abs=40)
    assert all(0 <= moment.delay <= 0.5 for moment in moments)


def test_kills_that_missed_are_short(bench, tmp_path):
    kill = bench("kill")
    training = kill.Training(("medseg",), tmp_path, tmp_path / "log.txt", 1)
    aimed = kill.Hit(kill.Moment(5, at="checkpoint"), True, -9, True, 0.1)
    good = kill.Hit(kill.Moment(7), True, -9, False, 0.1)
    late = kill.Hit(kill.Moment(9), False, 0, False, 0.0)
    assert kill.judge_kills([good, aimed], training) == [True, True, True]
    (tmp_path / "checkpoints/.12.x.part").mkdir(parents=True)
    outside = kill.Hit(kill.Moment(5, at="checkpoint"), True, -9, False, 0.1)
    assert kill.judge_kills([good, outside, late], training) == [False, False, False]


def test_a_stop_must_come_soon_and_with_its_status(bench):
    kill = bench("kill")
    good = kill.Hit(kill.Moment(7), True, 143, False, 2.0)
    killed = kill.Hit(kill.Moment(9), True, -15, False, 30.0)
    assert kill.judge_stops([good, good]) == [True, True]
    assert kill.judge_stops([good, killed]) == [False, False]


def test_the_curve_is_cut_evenly_into_whole_epochs(bench):
    marks = bench("nnunet_train").even_marks
    assert marks(600, 10) == [100, 200, 300, 400, 500, 600]
    assert marks(100, 25) == [25, 50, 75, 100]
