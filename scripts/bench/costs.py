"""Run a command and tell its time and memory, however large the process that asks is.

The kernel's figure of a child's peak memory begins with what its parent had in memory when it
started the child. So a small process of its own (this file, as a program) starts the command and
takes the figure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY_SECONDS = 0.25


@dataclass(frozen=True)
class Spent:
    """What a command took."""

    seconds: float
    largest_bytes: int
    """Largest resident memory of any one of its processes, by the kernel."""
    summed_bytes: int
    """Sum over its processes of the largest resident memory of each; what they share counts for
    each of them. Looked at now and then."""
    together_bytes: int
    """Largest memory of all its processes at one moment, what they share counted once."""
    num_processes: int

    @property
    def memory_bytes(self) -> int:
        """Return what it needs: all its processes at one moment; one, if a look missed its peak."""
        return max(self.together_bytes, self.largest_bytes)

    def __str__(self) -> str:
        """Return seconds and gigabytes."""
        return (
            f"{self.seconds:.2f} s; largest process {self.largest_bytes / 1e9:.2f} GB, "
            f"{self.num_processes} processes at once {self.together_bytes / 1e9:.2f} GB, sum of "
            f"their peaks {self.summed_bytes / 1e9:.2f} GB"
        )


def bind(num_cores: int) -> None:
    """Keep this process and all it starts to the first cores; as many threads are the default."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
    os.environ["OMP_NUM_THREADS"] = str(num_cores)


def measured(
    command: Sequence[str | Path], *, log: Path, environment: dict[str, str] | None = None
) -> Spent:
    """Run a command to its end and measure it; stop the benchmark if it fails.

    Args:
        command: Program and arguments.
        log: Where what it says is written.
        environment: Variables that it has besides those of this process.
    """
    words = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as said:
        report = Path(folder) / "report.json"
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, str(report), *words],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        looks = _Looks(process.pid)
        try:
            process.wait()
        finally:
            looks.end()
            with suppress(ProcessLookupError):  # what it left behind, or all of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = json.loads(report.read_text()) if report.is_file() else {"status": None}
    if found["status"] != 0:
        sys.exit(f"{' '.join(words)} failed; see {log}:\n{log.read_text(errors='replace')[-3000:]}")
    return Spent(
        seconds=found["seconds"],
        largest_bytes=found["peak_bytes"],
        summed_bytes=max(sum(looks.peaks.values()), found["peak_bytes"]),
        together_bytes=looks.together_bytes,
        num_processes=looks.num_processes,
    )


class _Looks:
    """What is seen of the processes of a session but its first, from beside them."""

    def __init__(self, session: int) -> None:
        self.peaks: dict[int, int] = {}
        self.together_bytes = 0
        self.num_processes = 0
        self._session = session
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(EVERY_SECONDS):
            together, count = 0, 0
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, KeyError):  # it has ended
                    if session_of(folder) == self._session != int(folder.name):
                        peak = _kilobytes(folder / "status")["VmHWM"] * 1024
                        self.peaks[int(folder.name)] = peak
                        together += _kilobytes(folder / "smaps_rollup")["Pss"] * 1024
                        count += 1
            self.together_bytes = max(self.together_bytes, together)
            self.num_processes = max(self.num_processes, count)


def session_of(folder: Path) -> int:
    """Return the session of a process, given its folder below /proc."""
    return int((folder / "stat").read_text().rpartition(")")[2].split()[3])


def _kilobytes(path: Path) -> dict[str, int]:
    """Return the sizes that a file of a process's folder tells, in kB."""
    rows = [line.split() for line in path.read_text().splitlines() if line.endswith(" kB")]
    return {row[0].removesuffix(":"): int(row[1]) for row in rows}


def alone(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Call a function; return what it gave, its seconds and its peak memory above that before."""
    own = Path("/proc/self/status")
    with suppress(OSError):  # where it is not allowed, the peak before counts too
        Path("/proc/self/clear_refs").write_text("5")
    before, start = _kilobytes(own)["VmRSS"], time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    peak = 1024 * (_kilobytes(own)["VmHWM"] - before)
    return result, {"seconds": seconds, "peak_bytes": peak}


def keep(path: Path | None, figures: dict[str, Any], verdicts: dict[str, bool]) -> int:
    """Write figures and verdicts as JSON, if asked to, and return the status of the benchmark."""
    if path is not None:
        found = {"arguments": sys.argv[1:], "figures": figures, "verdicts": verdicts}
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(verdicts.values()) else 1


def _launch(report: str, command: Sequence[str]) -> None:
    """Run a command and write what it took, its largest memory by the kernel."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    found = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": usage.ru_maxrss * 1024,
        "status": os.waitstatus_to_exitcode(status),
    }
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    _launch(sys.argv[1], sys.argv[2:])
