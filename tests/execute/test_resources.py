"""What the process may use: limits of cgroups and processors, from the system's own files."""

from __future__ import annotations

import pytest

from medseg.execute import resources


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Stand-ins for /proc and /sys/fs/cgroup, written by the tests."""
    texts = {"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:  2000 kB\n"}

    def read(path):
        return texts.get(str(path), "")

    monkeypatch.setattr(resources, "_read", read)
    return texts


def test_memory_of_a_machine_without_limits(system):
    assert resources.free_memory_bytes() == 2000 * 1024


def test_a_limit_of_the_own_group_counts(system):
    system["/proc/self/cgroup"] = "0::/jobs/mine\n"
    system["/sys/fs/cgroup/jobs/mine/memory.max"] = "1000000\n"
    system["/sys/fs/cgroup/jobs/mine/memory.current"] = "900000\n"
    assert resources.free_memory_bytes() == 100_000


def test_a_limit_of_a_parent_group_counts_and_cached_files_are_free(system):
    system["/proc/self/cgroup"] = "0::/jobs/mine\n"
    system["/sys/fs/cgroup/jobs/mine/memory.max"] = "max\n"
    system["/sys/fs/cgroup/jobs/mine/memory.current"] = "900000\n"
    system["/sys/fs/cgroup/jobs/memory.max"] = "1000000\n"
    system["/sys/fs/cgroup/jobs/memory.current"] = "950000\n"
    system["/sys/fs/cgroup/jobs/memory.stat"] = "anon 5\ninactive_file 200000\n"
    assert resources.free_memory_bytes() == 250_000


def test_groups_of_the_first_version(system):
    system["/proc/self/cgroup"] = "5:cpu,cpuacct:/a\n4:memory:/slurm/job_7\n"
    folder = "/sys/fs/cgroup/memory/slurm/job_7"
    system[f"{folder}/memory.limit_in_bytes"] = "1500000\n"
    system[f"{folder}/memory.usage_in_bytes"] = "500000\n"
    system[f"{folder}/memory.stat"] = "total_inactive_file 3000\n"
    assert resources.free_memory_bytes() == 1_003_000
    system[f"{folder}/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert resources.free_memory_bytes() == 2000 * 1024


def test_a_group_that_is_full_leaves_nothing(system):
    system["/sys/fs/cgroup/memory.max"] = "1000"
    system["/sys/fs/cgroup/memory.current"] = "5000"
    assert resources.free_memory_bytes() == 0


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(resources, "_read", lambda path: "")
    assert resources.free_memory_bytes() == 4_000_000_000


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("", 6)]
)
def test_a_quota_of_processors_counts(system, monkeypatch, quota, expected):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    system["/sys/fs/cgroup/cpu.max"] = quota
    assert resources.num_cpus() == expected


@pytest.fixture
def six(monkeypatch):
    """Let the process run on six processors."""
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


@pytest.mark.parametrize(
    ("own", "parent", "top", "expected"),
    [("max 100000", "200000 100000", "", 2), ("300000 100000", "400000 100000", "", 3),
     ("400000 100000", "max 100000", "150000 50000", 3), ("", "900000 100000", "", 6)],
)  # fmt: skip
def test_the_smallest_quota_of_nested_groups_counts(system, six, own, parent, top, expected):
    system["/proc/self/cgroup"] = "0::/jobs/mine\n"
    for folder, quota in (("/jobs/mine", own), ("/jobs", parent), ("", top)):
        system[f"/sys/fs/cgroup{folder}/cpu.max"] = f"{quota}\n"
    assert resources.num_cpus() == expected


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpuacct,cpu", "cpu"])
@pytest.mark.parametrize("at_job", [True, False])
def test_quotas_of_groups_of_the_first_version(system, six, controllers, at_job):
    system["/proc/self/cgroup"] = (
        f"7:cpuset:/set\n5:{controllers}:/slurm/job_7\n4:memory:/slurm/x\n"
    )
    folders = {"": "-1", "/slurm": "-1" if at_job else "250000"}
    folders["/slurm/job_7"] = "250000" if at_job else "500000"
    for folder, quota in folders.items():
        path = f"/sys/fs/cgroup/{controllers}{folder}"
        system[f"{path}/cpu.cfs_quota_us"] = f"{quota}\n"
        system[f"{path}/cpu.cfs_period_us"] = "100000\n"
    for other in ("cpuset/set", "memory/slurm/x"):  # not where quotas of processors are
        system[f"/sys/fs/cgroup/{other}/cpu.cfs_quota_us"] = "100000\n"
        system[f"/sys/fs/cgroup/{other}/cpu.cfs_period_us"] = "100000\n"
    assert resources.num_cpus() == 2


def test_a_quota_in_a_container_of_the_first_version(system, six):
    """The group's own path is that of the host, which is not there."""
    system["/proc/self/cgroup"] = "5:cpu,cpuacct:/docker/3f\n"
    system["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "50000\n"
    system["/sys/fs/cgroup/cpu/cpu.cfs_period_us"] = "100000\n"
    assert resources.num_cpus() == 1


def test_this_machine_tells():
    assert resources.free_memory_bytes() > 0
    assert resources.num_cpus() >= 1
