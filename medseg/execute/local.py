"""Map a function over cases on this machine: in this process, or in a pool where that pays."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from medseg.errors import MedsegError
from medseg.execute.resources import free_memory_bytes, num_cpus

T = TypeVar("T")

POOL_START_SECONDS = 3.0
"""Rough time until a spawned worker has imported what it needs."""


WATCH_SECONDS = 1.0
"""Time after which it is decided whether a pool pays."""
_MEMORY_SHARE = 0.8
"""Share of the free memory that cases worked on side by side may take."""
_WORKER_BYTES = 250_000_000
"""What a worker process takes before it has a case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[T]):
    """What came of one item: a value, or the error it ended with."""

    item: str
    value: T | None = None
    error: MedsegError | None = None


def map_cases(
    function: Callable[[str], T],
    items: Sequence[str],
    *,
    workers: int | None = None,
    needs: Mapping[str, int] | None = None,
) -> Iterator[Outcome[T]]:
    """Yield the outcome of `function(item)` for each item, in the order they finish.

    The first items run in this process. Once they have taken a moment, a pool is started if that
    saves more time than starting one takes; the first item, which loads what the function needs,
    counts only where it is the only one.

    Args:
        function: Picklable; gets one item.
        items: Case ids.
        workers: Processes; None uses the processors there are.
        needs: Item -> estimated memory in bytes. Items run side by side only while their needs
            fit the memory that is free together; one item alone always runs.
    """
    workers = workers or num_cpus()
    rest = deque(items)
    start = after_first = time.perf_counter()
    while rest:
        yield _call(function, rest.popleft())
        now = time.perf_counter()
        done = len(items) - len(rest)
        if done == 1:
            after_first = now
        each = (now - after_first) / (done - 1) if done > 1 else now - start
        saved = each * len(rest) * (1 - 1 / workers)
        if workers > 1 and now - start > WATCH_SECONDS and saved > POOL_START_SECONDS * 2:
            yield from _map_pool(function, rest, workers, needs or {})
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
    function: Callable[[str], T], items: Sequence[str], workers: int, needs: Mapping[str, int]
) -> Iterator[Outcome[T]]:
    """Map in processes; the items with the largest need come first, as memory allows."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(function,)
    )
    waiting = deque(sorted(items, key=lambda item: -needs.get(item, 0)))
    running: dict[Future[Outcome[T]], str] = {}
    budget = free_memory_bytes() * _MEMORY_SHARE - workers * _WORKER_BYTES
    try:
        while waiting or running:
            for item in _startable(waiting, running.values(), workers, needs, budget):
                running[pool.submit(_run, item)] = item
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield _outcome(future, running.pop(future))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _startable(
    waiting: deque[str],
    running: Iterable[str],
    workers: int,
    needs: Mapping[str, int],
    budget: float,
) -> Iterator[str]:
    """Take from `waiting` what may run now: the first that fits, in order; one in any case."""
    taken = list(running)
    left = budget - sum(needs.get(item, 0) for item in taken)
    for item in list(waiting):
        if len(taken) == workers:
            return
        if not taken or needs.get(item, 0) <= left:
            waiting.remove(item)
            taken.append(item)
            left -= needs.get(item, 0)
            yield item


def _outcome(future: Future[Outcome[T]], item: str) -> Outcome[T]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise MedsegError(
            f"a worker process died at or near case {item!r}: most often for lack of memory, or "
            "because a script that calls medseg has no 'if __name__ == \"__main__\":'. Run again "
            "with one worker (--workers 1)."
        ) from None


_functions: list[Callable[[str], Any]] = []
"""In a worker: the function it was started for, which may be large and is sent once."""


def _start(function: Callable[[str], Any]) -> None:
    """Prepare a worker: its function, and one thread for the numeric libraries."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    _functions.append(function)


def _run(item: str) -> Outcome[Any]:
    return _call(_functions[0], item)
