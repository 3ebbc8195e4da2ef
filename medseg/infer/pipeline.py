"""Three stages side by side: prepare, compute, finish; a thread each, queues of one between.

Each stage works on another item, in order. What goes wrong with one item becomes its outcome; what
asks the program to end ends all stages. Nothing is computed for a consumer that has gone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

I = TypeVar("I")  # noqa: E741 - an item
O = TypeVar("O")  # noqa: E741 - an outcome

_POLL_SECONDS = 0.1
"""How often a waiting thread looks whether it is to end."""
_JOIN_SECONDS = 4.0
"""How long the end of all stages is waited for; they are no obstacle to the process's end."""


class Gate:
    """Lets items in while their sizes together stay below a limit; a single one always."""

    def __init__(self, limit: float = float("inf")) -> None:
        self._limit, self._inside, self._count = limit, 0.0, 0
        self._changed = threading.Condition()

    def enter(self, size: float, should_stop: Callable[[], bool]) -> None:
        """Wait until there is room, or until it is no longer wanted."""
        with self._changed:
            while self._count and self._inside + size > self._limit and not should_stop():
                self._changed.wait(_POLL_SECONDS)
            self._inside += size
            self._count += 1

    def leave(self, size: float) -> None:
        """Make room."""
        with self._changed:
            self._inside -= size
            self._count -= 1
            self._changed.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages(Generic[I, O]):
    """What is done with an item; each function runs in a thread of its own."""

    prepare: Callable[[I], Any]
    compute: Callable[[Sequence[tuple[I, Any]]], Sequence[Any]]
    """Takes items with what was prepared of them; gives a value or an `Exception` for each."""
    finish: Callable[[I, Any], O]
    fail: Callable[[I, Exception], O]
    """Turns what went wrong with an item, in any stage, into its outcome."""
    size: Callable[[I], float] = lambda item: 0.0
    """Memory an item takes, for the gate."""
    together: int = 1
    """Most items that are computed at once, where so many are ready."""


@dataclass(slots=True)
class _Work:
    item: Any
    size: float
    value: Any = None
    error: Exception | None = None


class _Ended:
    """Follows the last item."""


def run(
    items: Iterable[I], stages: Stages[I, O], stop: threading.Event, gate: Gate | None = None
) -> Iterator[O]:
    """Yield the outcome of each item, in order.

    Args:
        items: Taken one by one, by the first stage's thread.
        stages: What is done.
        stop: Set at the end, however that comes; stages may ask it in long work.
        gate: What keeps too many items from being in memory together.

    Raises:
        BaseException: Whatever `items` raises, or a stage raises that is no `Exception`.
    """
    gate = gate or Gate()
    pipes: list[queue.Queue[Any]] = [queue.Queue(size) for size in (stages.together, 1, 1)]
    threads = [
        threading.Thread(target=target, args=arguments, daemon=True, name=f"medseg-{name}")
        for name, target, arguments in (
            ("prepare", _first, (items, stages, pipes[0], stop, gate)),
            ("compute", _middle, (stages, pipes[0], pipes[1], stop)),
            ("finish", _last, (stages, pipes[1], pipes[2], stop, gate)),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        while not isinstance(outcome := _take(pipes[2], stop), _Ended):
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome.value
    finally:
        stop.set()
        end = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))


def _first(
    items: Iterable[I],
    stages: Stages[I, O],
    target: queue.Queue[Any],
    stop: threading.Event,
    gate: Gate,
) -> None:
    try:
        for item in items:
            work = _Work(item, stages.size(item))
            gate.enter(work.size, stop.is_set)
            if stop.is_set():
                return
            _do(work, lambda: stages.prepare(item))  # noqa: B023 - called at once
            _give(target, work, stop)
        _give(target, _Ended(), stop)
    except BaseException as error:  # whatever it is, the consumer is told
        _give(target, error, stop)


def _middle(
    stages: Stages[Any, Any],
    source: queue.Queue[Any],
    target: queue.Queue[Any],
    stop: threading.Event,
) -> None:
    try:
        while isinstance(found := _take(source, stop), _Work):
            group, found = _group(found, source, stages.together)
            _compute(group, stages)
            for work in group:
                _give(target, work, stop)
            if not isinstance(found, _Work):
                break
        _give(target, found, stop)
    except BaseException as error:
        _give(target, error, stop)


def _group(first: _Work, source: queue.Queue[Any], most: int) -> tuple[list[_Work], Any]:
    """Return works that wait already, and the last thing taken: what is no work ends the group."""
    group, found = [first], first
    while len(group) < most and isinstance(found, _Work):
        try:
            found = source.get_nowait()
        except queue.Empty:
            break
        if isinstance(found, _Work):
            group.append(found)
    return group, found


def _compute(group: Sequence[_Work], stages: Stages[Any, Any]) -> None:
    """Put a value or an error into each work that has none yet."""
    able = [work for work in group if work.error is None]
    if not able:
        return
    pairs = [(work.item, work.value) for work in able]
    for work in able:
        work.value = None
    try:
        found = stages.compute(pairs)
    except Exception as error:
        found = [error] * len(able)
    for work, value in zip(able, found, strict=True):
        work.error = value if isinstance(value, Exception) else None
        work.value = None if isinstance(value, Exception) else value


def _last(
    stages: Stages[I, O],
    source: queue.Queue[Any],
    target: queue.Queue[Any],
    stop: threading.Event,
    gate: Gate,
) -> None:
    try:
        while isinstance(work := _take(source, stop), _Work):
            value, work.value = work.value, None
            if work.error is None:
                _do(work, lambda: stages.finish(work.item, value))  # noqa: B023 - called at once
            del value
            if work.error is not None:
                work.value = stages.fail(work.item, work.error)
            gate.leave(work.size)
            _give(target, work, stop)
        _give(target, work, stop)
    except BaseException as error:
        _give(target, error, stop)


def _do(work: _Work, action: Callable[[], Any]) -> None:
    try:
        work.value = action()
    except Exception as error:
        work.error = error


def _give(target: queue.Queue[Any], value: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            target.put(value, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return


def _take(source: queue.Queue[Any], stop: threading.Event) -> Any:
    while not stop.is_set():
        try:
            return source.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
    return _Ended()
