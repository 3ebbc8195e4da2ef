"""Mapping over cases: in this process or in a pool, errors kept with their case."""

from __future__ import annotations

import os
from collections import deque

import pytest

from medseg.errors import DatasetError, MedsegError
from medseg.execute import local
from medseg.execute.local import map_cases
from medseg.execute.resources import num_cpus


def work(item):
    if item == "bad":
        raise DatasetError("bad: cannot be read")
    return item.upper()


def test_serial_map_keeps_errors_with_their_case():
    found = list(map_cases(work, ["a", "bad", "c"], workers=1))
    assert [outcome.item for outcome in found] == ["a", "bad", "c"]
    assert [outcome.value for outcome in found] == ["A", None, "C"]
    assert [type(outcome.error) for outcome in found] == [type(None), DatasetError, type(None)]


def test_no_items():
    assert list(map_cases(work, [])) == []


def test_a_programming_error_is_not_swallowed():
    with pytest.raises(AttributeError):
        list(map_cases(lambda item: item.nothing, ["a"], workers=1))


def test_quick_work_starts_no_pool(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a pool was started")

    monkeypatch.setattr(local, "_map_pool", refuse)
    assert len(list(map_cases(work, ["a"] * 200, workers=8))) == 200


def test_slow_work_runs_in_a_pool(monkeypatch):
    """`eval` stands in for the work: every worker can import it."""
    monkeypatch.setattr(local, "POOL_START_SECONDS", 0.0)
    monkeypatch.setattr(local, "WATCH_SECONDS", 0.0)
    bad = "exec('from medseg.errors import DatasetError; raise DatasetError(\"no good\")')"
    pid, threads = "__import__('os').getpid()", "__import__('os').getpid() * 0 + 1"
    found = {o.item: o for o in map_cases(eval, ["1", pid, threads, bad], workers=2)}
    assert sorted(found) == sorted(["1", pid, threads, bad])
    assert found["1"].value == 1
    assert found[pid].value != os.getpid()
    assert isinstance(found[bad].error, DatasetError)
    assert str(found[bad].error) == "no good"


def test_a_dead_worker_names_its_case(monkeypatch):
    monkeypatch.setattr(local, "POOL_START_SECONDS", 0.0)
    monkeypatch.setattr(local, "WATCH_SECONDS", 0.0)
    dies = "__import__('os')._exit(9)"
    with pytest.raises(MedsegError, match="a worker process died at or near case") as caught:
        list(map_cases(eval, ["1", dies], workers=2))
    assert "_exit(9)" in str(caught.value)
    assert "--workers 1" in str(caught.value)


def test_large_items_run_side_by_side_only_where_they_fit():
    """Every step of the schedule, by hand: budget 10, needs 7, 6, 4, 3 and one beyond it."""
    needs = {"a": 7, "b": 6, "c": 4, "d": 3, "huge": 50}
    waiting = deque(sorted(needs, key=lambda item: -needs[item]))

    def start(running):
        return list(local._startable(waiting, running, 2, needs, 10))

    assert start([]) == ["huge"]
    assert start(["huge"]) == []
    assert start([]) == ["a", "d"]
    assert start(["a"]) == []
    assert start([]) == ["b", "c"]
    assert not waiting


def test_a_pool_runs_every_item_whatever_it_needs(monkeypatch):
    monkeypatch.setattr(local, "POOL_START_SECONDS", 0.0)
    monkeypatch.setattr(local, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(local, "free_memory_bytes", lambda: 1)
    items = [str(number) for number in range(5)]
    needs = dict.fromkeys(items, 10**15)
    found = {o.item: o.value for o in map_cases(eval, items, workers=2, needs=needs)}
    assert found == {item: int(item) for item in items}


def test_processors_this_process_may_use():
    assert 1 <= num_cpus() <= (os.cpu_count() or 1)
