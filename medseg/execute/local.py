"""Map a function over cases on this machine: in this process, or in a pool where that pays."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from medseg.errors import MedsegError

T = TypeVar("T")

POOL_START_SECONDS = 3.0
"""Rough time until a spawned worker has imported what it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """What came of one item: a value, or the error it ended with."""

    item: str
    value: T | None = None
    error: MedsegError | None = None


def num_cpus() -> int:
    """Return the number of processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_cases(
    function: Callable[[str], T], items: Sequence[str], *, workers: int | None = None
) -> Iterator[Outcome[T]]:
    """Yield the outcome of `function(item)` for each item, in the order they finish.

    The first item runs in this process; a pool is started only if the rest would take longer
    than starting one.

    Args:
        function: Picklable; gets one item.
        items: Case ids.
        workers: Processes; None uses the processors there are.
    """
    workers = workers or num_cpus()
    rest = list(items)
    start = time.perf_counter()
    while rest:
        yield _call(function, rest.pop(0))
        done = len(items) - len(rest)
        remaining = (time.perf_counter() - start) / done * len(rest)
        if workers > 1 and remaining * (1 - 1 / workers) > POOL_START_SECONDS * 2:
            yield from _map_pool(function, rest, workers)
            return


def _call(function: Callable[[str], T], item: str) -> Outcome[T]:
    try:
        return Outcome(item=item, value=function(item))
    except MedsegError as error:
        return Outcome(item=item, error=error)
    except Exception as error:
        error.add_note(f"case: {item}")
        raise


def _map_pool(
    function: Callable[[str], T], items: Sequence[str], workers: int
) -> Iterator[Outcome[T]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
    try:
        futures: dict[Any, str] = {pool.submit(_call, function, item): item for item in items}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                raise MedsegError(
                    f"a worker process died at or near case {futures[future]!r}: most often for "
                    "lack of memory, or because a script that calls medseg has no "
                    "'if __name__ == \"__main__\":'. Run again with one worker (--workers 1)."
                ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    """Keep the numeric libraries of a worker to one thread."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
