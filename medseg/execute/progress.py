"""Progress bars that move on a terminal and print now and then in a log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

_LOG_SECONDS = 30.0


tqdm.monitor_interval = 0  # no thread beside the bars: stopped in a write, it would block the end


class _Lines:
    """A stream that turns the redraws of a bar into lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int | None, title: str, *, shown: bool, unit: str = "case") -> Any:
    """Return a tqdm bar on standard error; `shown=False` gives one that prints nothing.

    Args:
        total: Steps to do; None if unknown.
        title: What is being done.
        shown: Whether to print at all.
        unit: What one step is.
    """
    options: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**options, dynamic_ncols=True, leave=True)
    lines = _Lines(sys.stderr)
    return tqdm(**options, file=lines, mininterval=_LOG_SECONDS, maxinterval=_LOG_SECONDS, ncols=90)
