"""One training on several GPUs: the same command in several processes, started and ended as one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from medseg.errors import ConfigError, MedsegError
from medseg.execute.children import LOOK_SECONDS, Children, how_it_ended, last_lines
from medseg.execute.resources import num_cpus

_LOST = 3
"""Exit status of a process that lost another one; that one knows why."""
_GRACE_SECONDS = 3.0
"""Time in which processes notice by themselves that one of them is gone, and say so."""


def launch(
    command: Sequence[str],
    count: int,
    *,
    environment: Mapping[str, str],
    devices: Sequence[str] = (),
) -> int:
    """Run a command in several processes that find each other as under torchrun.

    The first process, the main one, writes where this one does; what the others write is shown
    where it is the reason for an error. Signals are passed on. When a process fails, the others end
    within seconds; none is left behind.

    Args:
        command: Program and arguments, the same for all.
        count: Processes.
        environment: Variables of this process; each gets them, and RANK, WORLD_SIZE, LOCAL_RANK,
            MASTER_ADDR and MASTER_PORT.
        devices: One CUDA device for each, such as "cuda:2"; none: as CUDA numbers them.

    Returns:
        The main process's exit status.

    Raises:
        MedsegError: If another process failed, with its last lines.
    """
    shared = {**environment, **_meeting(count, environment)}
    if devices:
        shared["CUDA_VISIBLE_DEVICES"] = visible_devices(devices, environment)
    with TemporaryDirectory(prefix="medseg_") as folder, Children() as children:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(count)]
        processes = [
            children.start(
                command,
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                log=logs[rank] if rank else None,
            )
            for rank in range(count)
        ]
        failed = _watch(processes, children)
        children.end()
        if failed:
            _blame(failed, logs)
            return failed.get(0) or next(iter(failed.values()))
        return processes[0].returncode


def require_gpus(count: int, free: Sequence[str]) -> list[str]:
    """Return the GPUs that a training on `count` of them uses.

    Args:
        count: GPUs asked for.
        free: Devices that are free.

    Raises:
        ConfigError: If there are too few.
    """
    if count > len(free):
        names = ", ".join(free) or "none"
        raise ConfigError(
            f"gpus is {count}, but free CUDA devices are: {names}. Ask for fewer, or wait until "
            "others have ended; on a computer without GPUs leave --gpus out."
        )
    return list(free[:count])


def visible_devices(devices: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return CUDA_VISIBLE_DEVICES for processes that shall see these devices of this one.

    Examples:
        >>> visible_devices(["cuda:0", "cuda:2"], {"CUDA_VISIBLE_DEVICES": "4,5,7"})
        '4,7'
        >>> visible_devices(["cuda:0", "cuda:2"], {})
        '0,2'
    """
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    names = None if seen is None else [name.strip() for name in seen.split(",")]
    return ",".join(str(number) if names is None else names[number] for number in numbers)


def threads_each(count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that share the processors among processes; the user's own are kept."""
    if "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, num_cpus() // count))}


def _meeting(count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which processes of this machine find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    loop = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {
        **({} if "GLOO_SOCKET_IFNAME" in environment else loop),
        **threads_each(count, environment),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _watch(processes: Sequence[subprocess.Popen[bytes]], children: Children) -> dict[int, int]:
    """Wait for all processes, or for a moment after the first failure.

    Returns:
        Rank -> exit status of those that failed by themselves, in the order they did.
    """
    failed: dict[int, int] = {}
    until = float("inf")
    while time.monotonic() < until:
        statuses = {rank: process.poll() for rank, process in enumerate(processes)}
        for rank, status in statuses.items():
            if status and not _obeyed(status, children.signals):
                failed.setdefault(rank, status)
        if all(status is not None for status in statuses.values()):
            break
        if failed and until == float("inf"):
            until = time.monotonic() + _GRACE_SECONDS
        time.sleep(LOOK_SECONDS)
    return failed


def _obeyed(status: int, signals: Sequence[int]) -> bool:
    """Return whether a process ended because it was asked to, as shells count or as by Ctrl-C."""
    asked = (*signals, signal.SIGINT) if signals else ()
    return any(status in (128 + number, -number) for number in asked)


def _blame(failed: Mapping[int, int], logs: Sequence[Path]) -> None:
    """Raise the error of the process that failed of itself, unless that has been seen.

    One that was killed had no last word. Where the main process failed of itself, it has told the
    user, and the others often failed alike.
    """
    culprits = [rank for rank, status in failed.items() if status != _LOST] or list(failed)
    killed = [rank for rank in culprits if failed[rank] < 0]
    if 0 in culprits and not killed:
        return
    rank = (killed or culprits)[0]
    lines = "\n".join(f"  {line}" for line in last_lines(logs[rank])) if rank else ""
    raise MedsegError(
        f"process {rank + 1} of {len(logs)} {how_it_ended(failed[rank])}; the others were stopped."
        + (f" Its last lines:\n{lines}" if lines else "")
    )
