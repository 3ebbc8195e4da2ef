"""The loader: batches in order, errors where they belong, no thread left behind."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from medseg.data import loader as loader_module
from medseg.data.loader import batches, loader_threads
from medseg.data.patches import Annotation, PatchSampler
from medseg.errors import DatasetError


@pytest.fixture
def sampler(make):
    entries = {"a": make.entry(seed=1), "b": make.entry(seed=2)}
    return PatchSampler(
        entries=entries,
        case_ids=("a", "b"),
        patch_size=(4, 6, 5),
        batch_size=3,
        foreground_fraction=0.33,
        structures=((1,), (3,)),
        seed=0,
    )


class Slow:
    """A sampler whose early patches take longest, so that threads finish out of order."""

    def __init__(self, sampler, fail_at=None):
        self.sampler, self.fail_at = sampler, fail_at
        self.numbers = sampler.numbers

    def draw(self, k):
        if k == self.fail_at:
            raise DatasetError(f"patch {k} is bad")
        time.sleep(0.02 if (k // 3) % 2 == 0 else 0.0)
        return self.sampler.draw(k)


def our_threads():
    return [t for t in threading.enumerate() if t.name.startswith("medseg-patches")]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_batches_come_in_order_and_hold_their_patches(sampler, num_threads):
    found = list(islice(batches(Slow(sampler), first=0, num_threads=num_threads), 6))
    assert [batch.indices for batch in found] == [(k, k + 1, k + 2) for k in range(0, 18, 3)]
    for batch in found:
        for index, case, patch in zip(batch.indices, batch.case_ids, batch.patches, strict=True):
            expected = sampler.draw(index)
            assert case == expected.case_id
            np.testing.assert_array_equal(patch.image, expected.image)


def test_starting_later_gives_the_same_batches(sampler):
    early, late = batches(sampler, first=0), batches(sampler, first=4)
    expected = list(islice(early, 7))[4:]
    for batch, wanted in zip(islice(late, 3), expected, strict=True):
        assert batch.indices == wanted.indices
        for patch, other in zip(batch.patches, wanted.patches, strict=True):
            np.testing.assert_array_equal(patch.image, other.image)
    early.close()
    late.close()


def test_an_error_is_raised_at_its_own_batch(sampler):
    source = batches(Slow(sampler, fail_at=7), first=0, num_threads=2)
    assert [next(source).indices[0] for _ in range(2)] == [0, 3]
    with pytest.raises(DatasetError, match="patch 7 is bad"):
        next(source)
    assert our_threads() == []


def test_closing_ends_the_threads(sampler):
    source = batches(sampler, first=0, num_threads=2)
    next(source)
    assert our_threads()
    source.close()
    assert our_threads() == []


def test_only_a_few_batches_are_cut_ahead(sampler):
    drawn = []

    class Counting:
        numbers = staticmethod(sampler.numbers)

        def draw(self, k):
            drawn.append(k)
            return sampler.draw(k)

    source = batches(Counting(), first=0, prefetch=2)
    next(source)
    time.sleep(0.1)
    assert max(drawn) < 3 * (1 + 2)
    source.close()


def test_a_batch_says_what_was_annotated_only_if_something_was_not(sampler):
    partial = {"b": Annotation(channels=(True, False, True), structures=((3,),))}
    with closing(batches(replace(sampler, partial=partial), first=0)) as source:
        found = list(islice(source, 12))
    assert {"a", "b"} in [set(batch.case_ids) for batch in found]
    for batch in found:
        if "b" not in batch.case_ids:
            assert batch.annotated is None
            continue
        expected = [[True, case != "b", True] for case in batch.case_ids]
        assert batch.annotated.dtype == bool
        assert batch.annotated.tolist() == expected
    with closing(batches(sampler, first=0)) as source:
        assert next(source).annotated is None


def test_what_is_finished_is_finished_in_the_threads_that_cut(sampler):
    seen = []

    def finish(patch):
        seen.append(threading.current_thread().name)
        return replace(patch, case_id=f"finished {patch.case_id}")

    with closing(batches(sampler, first=2, finish=finish)) as source:
        found = next(source)
    assert found.case_ids == tuple(f"finished {sampler.draw(k).case_id}" for k in (6, 7, 8))
    assert all(name.startswith("medseg-patches") for name in seen)


def test_patches_of_one_batch_are_cut_side_by_side(sampler):
    meeting = threading.Barrier(3, timeout=20)

    class Waiting:
        numbers = staticmethod(sampler.numbers)

        def draw(self, k):
            if k < 3:
                meeting.wait()
            return sampler.draw(k)

    with closing(batches(Waiting(), first=0, num_threads=3, prefetch=0)) as source:
        assert next(source).indices == (0, 1, 2)


def test_processes_cut_their_own_samples_of_each_batch(sampler):
    with closing(batches(replace(sampler, positions=(2, 0)), first=1)) as source:
        assert [batch.indices for batch in islice(source, 2)] == [(5, 3), (8, 6)]


@pytest.mark.parametrize(
    ("cpus", "processes", "threads"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (64, 1, 8), (16, 4, 3), (4, 8, 1)],
)
def test_a_processor_is_left_to_the_network(monkeypatch, cpus, processes, threads):
    monkeypatch.setattr(loader_module, "num_cpus", lambda: cpus)
    assert loader_threads(processes) == threads
