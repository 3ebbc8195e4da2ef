"""Requests to stop, made by signals: noted at once, granted where training can stop well."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGBREAK")
"""Stop, Ctrl-C, SLURM's early warning, a closed terminal, Ctrl-Break; those the system has."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop and has done so, its checkpoint written.

    Like Ctrl-C it is no error: whoever handles errors and goes on does not catch it.
    """

    def __init__(self, number: int, iteration: int) -> None:
        """Tell which signal asked, and after how many optimiser steps the run stands."""
        super().__init__(number, iteration)
        self.signal, self.iteration = number, iteration

    def __str__(self) -> str:
        """Return the line for the user."""
        return (
            f"Stopped by {signal_name(self.signal)} after iteration {self.iteration}; the "
            "checkpoint is written. The same command, without --restart, goes on from there."
        )

    @property
    def exit_status(self) -> int:
        """Return what the process ends with: 128 and the signal's number, as shells count."""
        return 128 + self.signal


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        """Begin without a request."""
        self.signal: int | None = None
        self._interrupts = 0

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Keep the first signal; a second Ctrl-C does not wait any longer.

        Raises:
            KeyboardInterrupt: At the second SIGINT.
        """
        self.signal = self.signal or number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note signals that ask to stop, instead of dying of them, within a `with` block.

    Only a process's main thread receives signals; in another one no request ever comes. What was
    ignored before, as SIGHUP is under nohup, stays ignored.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    previous[number] = signal.signal(number, request.note)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    """Return a signal's name.

    Examples:
        >>> signal_name(15), signal_name(1000)
        ('SIGTERM', 'signal 1000')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
