"""The benchmark of the augmentation judges its ratio, and only against the peer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("augment")
    for name in ("augment", "augment_probe", "peer"):
        sys.modules.pop(name, None)


class Side:
    """Takes a fixed time for every sample but one, which takes long."""

    def __init__(self, seconds):
        self.calls, self._seconds = [], seconds

    def seconds(self, patch, count, seed):
        self.calls.append((patch, count, seed))
        return [self._seconds * (100 if seed == 2 else 1)] * count


@pytest.mark.parametrize(("theirs", "is_met"), [(0.031, True), (0.029, False)])
def test_medians_over_rounds_are_compared_with_the_stated_ratio(benchmark, capsys, theirs, is_met):
    sides = {"medseg": Side(0.01), "batchgeneratorsv2": Side(theirs)}
    assert benchmark._compare(sides, (8, 9, 10), 4, 3) is is_met
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("met: 8x9x10: 3.1 times" if is_met else "short: 8x9x10: 2.9 times")
    asked = [((8, 9, 10), 4, number) for number in (1, 2, 3)]
    assert all(side.calls == asked for side in sides.values())


def test_nothing_is_judged_without_the_peer(benchmark, capsys):
    assert benchmark._compare({"medseg": Side(0.01)}, (8, 9, 10), 4, 3)
    assert "not judged" in capsys.readouterr().out
