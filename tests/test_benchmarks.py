"""The benchmarks judge what they measure: short of a limit is said, and is no success."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg.resample import resize_labels

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a benchmark as it is when it is run: its folder is searched first."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("peer", "prepare", "volumes")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("speed", "share", "verdicts"),
    [(6.0, 0.6, [True, True]), (5.9, 0.6, [False, True]), (9.0, 0.61, [True, False])],
)
def test_preparing_is_judged_against_the_stated_ratios(bench, capsys, speed, share, verdicts):
    assert bench("prepare").judge_ratios(speed, share) == verdicts
    starts = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["met" if is_met else "short" for is_met in verdicts]


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ({}, [True, True, True]),
        ({"seconds": 9.0}, [True, True, True]),
        ({"torch": True}, [True, False, True]),
        ({"pool": True}, [True, True, False]),
    ],
    ids=["good", "one slow run of three", "torch once", "pool once"],
)
def test_one_more_case_is_judged_by_its_median_and_by_every_run(bench, change, verdicts):
    good = {"seconds": 1.4, "torch": False, "pool": False}
    assert bench("prepare").judge_growth([good, {**good, **change}, good]) == verdicts


def test_one_more_case_that_is_slow_in_the_median_is_short(bench):
    slow = {"seconds": 1.5, "torch": False, "pool": False}
    assert bench("prepare").judge_growth([slow, {**slow, "seconds": 0.1}, slow])[0] is False


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_preparing_alone_judges_what_can_be_judged(bench, monkeypatch, capsys, tmp_path, seconds):
    """Two processes, as the peer has; without the peer no ratio; the status follows the rest."""
    prepare = bench("prepare")
    commands = []
    monkeypatch.setattr(prepare, "run", lambda c: commands.append(c) or prepare.Cost(1.0, 10))
    grown = [{"seconds": seconds, "torch": False, "pool": False}]
    monkeypatch.setattr(prepare, "_grow", lambda *_: prepare.judge_growth(grown))
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path), "--repeats", "1"])
    assert prepare.main() == (0 if seconds < 1.5 else 1)
    assert list(commands[0][-2:]) == ["--workers", "2"]
    assert "not judged without --peer-python: speed and disk space" in capsys.readouterr().out


def test_volumes_are_judged_by_time_memory_images_and_labels(bench, capsys):
    volumes = bench("volumes")
    ours = volumes.Cost(10.0, 3000)
    assert volumes.judge_costs(ours, volumes.Cost(60.0, 9000)) == [True, True]
    assert volumes.judge_costs(ours, volumes.Cost(59.0, 8000)) == [False, False]
    assert volumes.judge_case("a", 9e-4, [True, True], 100) == [True, True]
    assert volumes.judge_case("a", 2e-3, [True, False, False], 100) == [False, False]
    assert volumes.judge_case("a", float("nan"), [], 100) == [False, True]
    out = capsys.readouterr().out
    assert "short: a: 3 of 100 labels differ, 2 of them without a tie" in out


@pytest.mark.parametrize("separate", [None, 0, 2])
@pytest.mark.parametrize("shape", [(5, 7, 9), (6, 10, 8), (3, 5, 4), (12, 14, 8)])
def test_the_labels_allowed_in_a_voxel_hold_the_one_it_gets(bench, shape, separate):
    """And mostly it alone, or nothing would be found out."""
    best = bench("volumes").best_labels
    labels = np.random.default_rng(3).integers(0, 4, (6, 7, 4)).astype(np.uint8)
    resized = resize_labels(labels, shape, separate=separate)
    allowed = [best(labels, shape, point, separate) for point in np.ndindex(shape)]
    assert all(int(label) in some for label, some in zip(resized.ravel(), allowed, strict=True))
    assert min(map(len, allowed)) == 1


def test_a_tie_allows_both_labels_and_a_near_tie_one(bench):
    best = bench("volumes").best_labels
    labels = np.array([[[1, 2]], [[1, 2]]], np.uint8)
    assert best(labels, (2, 1, 3), (0, 0, 1), None) == {1, 2}
    assert best(labels, (2, 1, 3), (0, 0, 1), 2) == {1, 2}
    assert best(labels, (2, 1, 5), (0, 0, 1), None) == {1}
