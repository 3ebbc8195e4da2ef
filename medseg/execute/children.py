"""Processes that this one starts: they are told its signals, and none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

LOOK_SECONDS = 0.05
"""Time between two looks at processes that run."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_PATIENCE = 2
"""Times a signal is passed on; the next one ends what still runs."""
_TIED = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(1, 9) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that Linux kills when the process which started it ends, however it ends."""


class Children:
    """Processes of a `with` block; its end is theirs.

    Each has a session of its own, so that Ctrl-C in the terminal reaches this process alone. It
    passes signals on and waits: a training then writes its checkpoint. Where this process is
    killed, Linux kills them.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self.signals: list[int] = []
        """What was passed on, in order."""
        self._running: list[subprocess.Popen[bytes]] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Children:
        """Pass signals on from now on, where this is the main thread, which receives them."""
        if threading.current_thread() is threading.main_thread():
            for number in [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End what still runs."""
        self.end()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process that reads nothing.

        Args:
            command: Program and arguments.
            environment: All of its variables.
            log: File that its output is added to; None: it writes where this process does.
        """
        tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]
        output = None if log is None else log.open("ab")
        try:
            process = subprocess.Popen(
                tied if sys.platform == "linux" else list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()
        self._running.append(process)
        return process

    def end(self, patience_seconds: float = 5.0) -> None:
        """Ask what runs to end; kill what does not, and what the processes left behind."""
        for process in self._running:
            _tell(process, signal.SIGTERM)
        until = time.monotonic() + patience_seconds
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        for process in self._running:
            _kill(process)
        self._running.clear()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.signals.append(number)
        for process in self._running:
            if self.signals.count(number) <= _PATIENCE:
                _tell(process, number)
            else:
                _kill(process)


def last_lines(log: Path, count: int = 12) -> list[str]:
    """Return the last lines of a log that say anything, each without what was overwritten."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


def how_it_ended(status: int) -> str:
    """Return in words how a process ended.

    Examples:
        >>> how_it_ended(2), how_it_ended(-15)
        ('ended with status 2', 'was ended by SIGTERM')
    """
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    reason = ", most often for lack of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{reason}"


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            process.send_signal(number)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started; wait until it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
