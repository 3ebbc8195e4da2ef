"""Three stages: order, errors, ends."""

from __future__ import annotations

import threading
import time

import pytest

from medseg.infer.pipeline import Gate, Stages, run


def stages(**changes):
    values = {
        "prepare": lambda item: item * 10,
        "compute": lambda pairs: [value + 1 for _, value in pairs],
        "finish": lambda item, value: (item, value),
        "fail": lambda item, error: (item, f"{type(error).__name__}: {error}"),
    }
    return Stages(**{**values, **changes})


def outcomes(items, chosen, stop=None, gate=None):
    return list(run(items, chosen, stop or threading.Event(), gate))


def alive():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("medseg-")]


def test_every_item_passes_every_stage_in_order():
    assert outcomes(range(25), stages()) == [(n, n * 10 + 1) for n in range(25)]
    assert outcomes([], stages()) == []
    assert alive() == []


@pytest.mark.parametrize("stage", ["prepare", "compute", "finish"])
def test_what_goes_wrong_with_one_item_is_its_outcome(stage):
    original = getattr(stages(), stage)

    def flaky(given, *rest):
        if (given[0][0] if stage == "compute" else given) == 2:
            raise ValueError("no")
        return original(given, *rest)

    found = outcomes(range(5), stages(**{stage: flaky}))
    assert found[2] == (2, "ValueError: no")
    assert [pair for pair in found if pair[0] != 2] == [(n, n * 10 + 1) for n in (0, 1, 3, 4)]


def test_stages_work_side_by_side():
    def slow(given, *_):
        time.sleep(0.1)
        return [None] if isinstance(given, list) else None

    start = time.perf_counter()
    outcomes(range(6), stages(prepare=slow, compute=slow, finish=slow))
    assert time.perf_counter() - start < 6 * 0.3 * 0.75


def test_what_the_items_raise_is_raised():
    def items():
        yield 1
        raise OSError("the list ends here")

    found = run(items(), stages(), threading.Event())
    with pytest.raises(OSError, match="the list ends here"):
        list(found)
    assert alive() == []


@pytest.mark.parametrize("stage", ["prepare", "compute", "finish"])
def test_what_ends_the_program_ends_all_stages(stage):
    def ending(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcomes(range(9), stages(**{stage: ending}))
    assert alive() == []


def test_a_consumer_that_goes_ends_the_stages():
    taken, stop = [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    found = run(items(), stages(), stop)
    next(found)
    found.close()
    assert stop.is_set()
    assert alive() == []
    assert len(taken) < 12


def test_long_work_can_ask_whether_it_is_still_wanted():
    stop, seen = threading.Event(), threading.Event()

    def patient(pairs):
        seen.set()
        while not stop.is_set():
            time.sleep(0.01)
        return [None] * len(pairs)

    found = run(range(3), stages(compute=patient), stop)
    threading.Thread(target=lambda: (seen.wait(), stop.set()), daemon=True).start()
    assert list(found) == []
    assert alive() == []


def test_items_that_are_large_together_wait_for_each_other():
    inside, most = [], []
    lock = threading.Lock()

    def prepare(item):
        with lock:
            inside.append(item)
            most.append(len(inside))

    def finish(item, value):
        with lock:
            inside.remove(item)
        return item

    chosen = stages(prepare=prepare, compute=lambda pairs: [time.sleep(0.01)], finish=finish,
                    size=lambda item: 6)  # fmt: skip
    assert outcomes(range(8), chosen, gate=Gate(13)) == list(range(8))
    assert max(most) == 2
    most.clear()
    assert outcomes(range(4), chosen, gate=Gate(1)) == list(range(4)), "one always passes"
    assert max(most) == 1


def test_items_that_are_ready_are_computed_together():
    """No more than asked for at once, in order, and one that failed before is left out."""
    groups, begun = [], threading.Event()

    def prepare(item):
        if item == 3:
            raise ValueError("no")
        if item == 11:
            begun.set()
        return item

    def compute(pairs):
        begun.wait(5)
        groups.append([item for item, _ in pairs])
        return [ValueError("odd") if item == 6 else value for item, value in pairs]

    found = outcomes(range(12), stages(prepare=prepare, compute=compute, together=11))
    failed = {3: (3, "ValueError: no"), 6: (6, "ValueError: odd")}
    assert found == [failed.get(n, (n, n)) for n in range(12)]
    assert max(map(len, groups)) > 3
    assert max(map(len, groups)) <= 11
    assert [item for group in groups for item in group] == [n for n in range(12) if n != 3]
