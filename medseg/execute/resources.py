"""What this process may use of the machine: processors and memory, cgroup limits respected."""

from __future__ import annotations

import os
from pathlib import Path

_UNKNOWN_BYTES = 4_000_000_000
"""What is assumed where the system does not tell."""
_USUAL_BYTES = 500_000_000
"""What a process with torch holds, where the system does not tell."""
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of a cgroup, versions 2 and 1: what it may take, what it has taken."""


def num_cpus() -> int:
    """Return the number of processors this process may run on.

    Affinity and the smallest processor quota of the process's cgroups and their parents count,
    not the processors of the machine.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [quota for quota in map(_cpu_quota, _groups("cpu")) if quota is not None]
    return max(1, min([allowed or 1, *quotas]))


def free_memory_bytes() -> int:
    """Return the memory this process may still take, as far as the system tells.

    The smaller of what is available on the machine and what the limits of the process's cgroups
    leave; pages of files that the system can drop count as free.
    """
    limits = [_available(Path("/proc/meminfo")), *map(_left_in_group, _groups("memory"))]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else _UNKNOWN_BYTES


def resident_bytes() -> int:
    """Return the memory this process holds now; a usual amount where the system does not tell."""
    rows = dict(line.split(":", 1) for line in _read(Path("/proc/self/status")).splitlines()
                if ":" in line)  # fmt: skip
    amount = rows.get("VmRSS", "").split()
    return int(amount[0]) * 1024 if amount and amount[0].isdigit() else _USUAL_BYTES


def _available(path: Path) -> int | None:
    text = _read(path)
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    amount = rows.get("MemAvailable", "").split()
    return int(amount[0]) * 1024 if amount and amount[0].isdigit() else None


def _groups(controller: str) -> list[Path]:
    """Return the folders of the process's cgroup and its parents, of either version.

    In version 1 each controller, "memory" or "cpu", has a tree of its own; controllers that are
    mounted together ("cpu,cpuacct") have one, which lies under that name too.
    """
    folders = [_CGROUP, _CGROUP / controller]
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        is_first = controller in controllers.split(",")
        if not is_first and controllers != "":
            continue
        for root in dict.fromkeys((controller, controllers) if is_first else ("",)):
            top = _CGROUP / root
            folder = top / path.lstrip("/")
            folders += [folder, *(p for p in folder.parents if top in (p, *p.parents))]
    return list(dict.fromkeys(folders))


def _left_in_group(folder: Path) -> int | None:
    """Return what one cgroup leaves, or None where it has no limit."""
    for limit_name, used_name in _LIMITS:
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None and limit < 1 << 60:
            return limit - used + _droppable(folder / "memory.stat")
    return None


def _droppable(path: Path) -> int:
    rows = dict(line.split(" ", 1) for line in _read(path).splitlines() if " " in line)
    amount = rows.get("inactive_file", rows.get("total_inactive_file", "0"))
    return int(amount) if amount.isdigit() else 0


def _cpu_quota(folder: Path) -> int | None:
    """Return the whole processors a cgroup may use, at least 1, or None without a quota."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    amount = _read(folder / "cpu.max").split() or [_read(folder / name).strip() for name in names]
    if len(amount) != 2 or not (amount[0].isdigit() and amount[1].isdigit()):
        return None
    return max(1, int(amount[0]) // max(1, int(amount[1])))


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
