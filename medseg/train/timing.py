"""Where the time of a step goes, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("wait", "augment", "forward", "backward")
"""Waiting for patches; augmentation; network and loss; gradients and the optimiser's step."""


class Clock:
    """Adds up the seconds of each part of the steps since it was last read.

    On CUDA the work of a part is queued, not done, when the part ends. Its time is then that
    between two events on the device, looked at only when the clock is read.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._has_events = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for `name`; waiting is the host's, the rest the device's."""
        if self._has_events and name != "wait":
            first, last = _event(), _event()
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading, and begin anew.

        On CUDA this waits for the device.
        """
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        found = {name: self._seconds.get(name, 0.0) for name in PARTS}
        self._seconds.clear()
        self._events.clear()
        return found


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
