"""Folds side by side, a process and a GPU each."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from medseg.api.launch import threads_each
from medseg.errors import MedsegError
from medseg.execute.children import LOOK_SECONDS, Children, how_it_ended, last_lines

logger = logging.getLogger(__name__)

_BUSY_SHARE = 0.1
_BUSY_BYTES = 500_000_000
"""A GPU is free if less than this and that share of its memory are taken; a screen may be on it."""
_PROBE = """
import json, torch
found = []
for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
    try:
        found.append(torch.cuda.mem_get_info(index))
    except RuntimeError:
        found.append(None)
print(json.dumps(found))
"""
_REDRAW_SECONDS = 1.0
_LOG_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class FoldProcess:
    """A fold, and the process that trains it."""

    name: str
    log: Path
    device: str = ""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float | None = None
    """How long it ran; None while it does, and before."""
    status: int | None = None

    def line(self) -> str:
        """Return where the fold stands, in one line."""
        return f"{self.name:8} {self.device:8} {self._state()}".rstrip()

    def _state(self) -> str:
        if self.process is None:
            return "waits" if self.status is None else "not started"
        if self.status is None:
            told = (last_lines(self.log, 1) or ["starts"])[0]
            return told.removeprefix(f"train {self.name}:").strip()
        if self.status == 0:
            return f"done in {_duration(self.seconds or 0)}"
        return f"{how_it_ended(self.status)} after {_duration(self.seconds or 0)}"


def run_folds(
    folds: Sequence[str],
    devices: Sequence[str],
    command_of: Callable[[str, str], Sequence[str]],
    *,
    logs: Path,
    environment: Mapping[str, str],
    shown: bool = True,
) -> None:
    """Train folds side by side, each on a device of its own; the next where one ended.

    A fold that fails does not stop the others. Signals are passed on, no further fold is started,
    and those that run are waited for, so that they write their checkpoints.

    Args:
        folds: Names.
        devices: What they share; one fold on each at a time.
        command_of: (fold, device) -> program and arguments that train it.
        logs: Folder of the folds' output, FOLD.txt, which is written anew.
        environment: Variables of this process, which theirs get too.
        shown: Show on standard error where the folds stand.

    Raises:
        MedsegError: After all have ended, if some failed: with their names and last lines.
        KeyboardInterrupt: After all have ended, if this process was asked to stop.
    """
    logs.mkdir(parents=True, exist_ok=True)
    rows = [FoldProcess(name=fold, log=logs / f"{fold}.txt") for fold in folds]
    variables = {**environment, **threads_each(min(len(devices), len(folds)), environment)}
    board = _Board(rows, sys.stderr, shown=shown)
    with Children() as children:
        waiting, free = deque(rows), deque(devices)
        while True:
            while waiting and free and not children.signals:
                row = waiting.popleft()
                row.device, row.started = free.popleft(), time.monotonic()
                row.log.unlink(missing_ok=True)
                row.process = children.start(
                    command_of(row.name, row.device), variables, log=row.log
                )
            free.extend(row.device for row in _ended(rows))
            board.show()
            if all(row.process is None or row.status is not None for row in rows) and (
                not waiting or children.signals
            ):
                break
            time.sleep(LOOK_SECONDS)
        board.show(last=True)
        if children.signals:
            raise KeyboardInterrupt
    _complain(rows)


def free_devices() -> list[str]:
    """Return the CUDA devices that nothing uses, as this process would name them.

    Another process looks: one that has looked at a GPU keeps some of its memory.
    """
    found = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False
    )
    if found.returncode:
        logger.warning("GPUs could not be looked at: %s", found.stderr.strip()[-300:])
        return []
    return free_of(json.loads(found.stdout.splitlines()[-1]))


def free_of(memory: Sequence[Sequence[int] | None]) -> list[str]:
    """Return which devices are free.

    Args:
        memory: Free and total bytes of each CUDA device; None: it lets nobody in.

    Examples:
        >>> free_of([(23_000_000_000, 24_000_000_000), (8_000_000_000, 24_000_000_000), None])
        ['cuda:0']
    """
    return [
        f"cuda:{index}"
        for index, row in enumerate(memory)
        if row is not None and row[1] - row[0] < _BUSY_BYTES + _BUSY_SHARE * row[1]
    ]


def _ended(rows: Sequence[FoldProcess]) -> Iterator[FoldProcess]:
    """Yield the folds that ended since the last look."""
    for row in rows:
        if row.process is not None and row.status is None:
            row.status = row.process.poll()
            if row.status is not None:
                row.seconds = time.monotonic() - row.started
                yield row


def _complain(rows: Sequence[FoldProcess]) -> None:
    failed = [row for row in rows if row.status]
    if not failed:
        return
    parts = [f"{len(failed)} of {len(rows)} folds failed; the others are trained:"]
    for row in failed:
        parts.append(f"{row.name} {how_it_ended(row.status or 0)} ({row.log}):")
        parts += [f"  {line}" for line in last_lines(row.log)]
    raise MedsegError("\n".join(parts))


class _Board:
    """Where every fold stands: a table that is redrawn on a terminal, lines now and then in a log.

    In a log a fold has a line when it begins and ends, and once a minute in between.
    """

    def __init__(self, rows: Sequence[FoldProcess], stream: TextIO, *, shown: bool) -> None:
        self._rows, self._stream, self._shown = rows, stream, shown
        self._is_terminal = stream.isatty()
        self._drawn_at = -float("inf")
        self._height = 0
        self._said: dict[str, tuple[str, float]] = {}

    def show(self, *, last: bool = False) -> None:
        """Show what changed, if it is time."""
        if not self._shown:
            return
        now = time.monotonic()
        if self._is_terminal and (last or now - self._drawn_at >= _REDRAW_SECONDS):
            self._drawn_at = now
            self._redraw()
        elif not self._is_terminal:
            for row in self._rows:
                self._say(row, now)

    def _redraw(self) -> None:
        width = max(20, _columns(self._stream) - 1)
        up = f"\x1b[{self._height}A" if self._height else ""
        lines = [f"\x1b[2K{row.line()[:width]}\n" for row in self._rows]
        self._stream.write(f"{up}\r{''.join(lines)}")
        self._stream.flush()
        self._height = len(lines)

    def _say(self, row: FoldProcess, now: float) -> None:
        kind = "waits" if row.process is None else "runs" if row.status is None else "ended"
        before, said_at = self._said.get(row.name, ("waits", now))
        if kind != before or (kind == "runs" and now - said_at >= _LOG_SECONDS):
            self._said[row.name] = (kind, now)
            self._stream.write(row.line() + "\n")
            self._stream.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 80


def _duration(seconds: float) -> str:
    """Return a time in words.

    Examples:
        >>> _duration(8.2), _duration(125), _duration(8000)
        ('8 s', '2 min', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(int(seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
