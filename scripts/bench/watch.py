"""Run a command on a few cores and watch what it uses: memory of all its processes, the GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    time: float
    """`time.time()`."""
    memory_bytes: int | None
    """Memory of all processes of the command, shared pages counted once; None if not known."""
    gpu_busy: float | None
    """Share of the last moments in which the GPU worked; None without one."""
    gpu_bytes: int | None
    """Memory in use on the GPU, by whomever."""


@dataclass(frozen=True)
class Use:
    """What a command used."""

    began: float
    """`time.time()` at its start."""
    seconds: float
    samples: tuple[Sample, ...]
    gpu_bytes_before: int | None

    @property
    def peak_bytes(self) -> int | None:
        """Return the largest memory of all processes together."""
        return max((s.memory_bytes for s in self.samples if s.memory_bytes), default=None)

    @property
    def gpu_peak_bytes(self) -> int | None:
        """Return the largest memory on the GPU beyond what was in use before."""
        if self.gpu_bytes_before is None:
            return None
        used = [s.gpu_bytes for s in self.samples if s.gpu_bytes is not None]
        return max(used) - self.gpu_bytes_before if used else None

    def gpu_busy(self, start: float, end: float) -> float | None:
        """Return the mean share of a time in which the GPU worked; None if not measured."""
        seen = [
            s.gpu_busy for s in self.samples if start <= s.time <= end and s.gpu_busy is not None
        ]
        return mean(seen) if seen else None


def watch(
    command: Sequence[str | Path],
    *,
    cores: int,
    log: Path,
    is_enough: Callable[[], bool] | None = None,
) -> Use:
    """Run a command on the first `cores` cores to its end; stop the benchmark if it fails.

    Args:
        command: Program and arguments.
        cores: Cores its processes may use; as many threads are OpenMP's default.
        log: Where what it says is written.
        is_enough: Asked now and then whether to end it with SIGTERM.
    """
    look = gpu_probe()
    before = look()
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    began, samples, is_stopped = time.time(), [], False
    with log.open("wb") as said:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(cores)},
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        try:
            while process.poll() is None:
                found = look()
                samples.append(
                    Sample(time.time(), session_bytes(process.pid), *(found or (None, None)))
                )
                if is_enough is not None and not is_stopped and is_enough():
                    process.terminate()
                    is_stopped = True
                _wait(process, EVERY_SECONDS)
        finally:
            with suppress(ProcessLookupError):  # what it left behind, or all of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.time() - began
    if process.returncode and not is_stopped:
        sys.exit(f"{' '.join(map(str, command))} failed; see {log}:\n{log.read_text()[-3000:]}")
    return Use(began, seconds, tuple(samples), before[1] if before else None)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def session_bytes(session: int) -> int | None:
    """Return the memory of a session's processes, each shared page counted once (PSS)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue  # it has ended
    return total * 1024 or None


def gpu_probe() -> Callable[[], tuple[float, int] | None]:
    """Return a function that gives the busy share of the first visible GPU and its bytes in use."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    if importlib.util.find_spec("pynvml"):
        return lambda: _by_nvml(number)
    if shutil.which("nvidia-smi"):
        return lambda: _by_command(number)
    return lambda: None


def _by_nvml(number: str) -> tuple[float, int] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(int(number))
        busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
        return busy / 100, int(pynvml.nvmlDeviceGetMemoryInfo(device).used)
    except pynvml.NVMLError:
        return None


def _by_command(number: str) -> tuple[float, int] | None:
    asked = "--query-gpu=utilization.gpu,memory.used"
    command = ["nvidia-smi", "-i", number, asked, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return read_answer(answer.stdout) if answer.returncode == 0 else None


def read_answer(text: str) -> tuple[float, int] | None:
    """Return busy share and bytes in use from nvidia-smi's "percent, MiB"; None if it knows not."""
    try:
        busy, used = text.strip().splitlines()[0].split(",")
        return float(busy) / 100, int(used) * 2**20
    except (IndexError, ValueError):
        return None
