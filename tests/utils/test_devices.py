"""CPU quotas of containers."""

import math

import pytest

from utils.devices import Cores, count_cores, cpu_quota

QUOTAS = {  # content of /proc/self/cgroup, of the files under /sys/fs/cgroup, and the expected quota
    "docker run --cpus=3.5, version 2": ("0::/", {"cpu.max": "350000 100000"}, 3.5),
    "version 2, a limit of the parent": ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
    "version 1": (
        "5:memory:/m\n4:cpu,cpuacct:/c",
        {"cpu/c/cpu.cfs_quota_us": "250000", "cpu/c/cpu.cfs_period_us": "50000", "cpu/cpu.cfs_quota_us": "-1"},
        5.0,
    ),
    "version 1, in a container that sees only its own group": (
        "4:cpu,cpuacct:/docker/0123",
        {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"},
        1.5,
    ),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, math.inf),
    "no control groups": ("", {}, math.inf),
    "unknown format": ("0::/", {"cpu.max": "unlimited"}, math.inf),
}


@pytest.mark.parametrize(("membership", "files", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_the_cpu_quota_of_a_container_limits_the_cores(membership, files, expected, tmp_path):
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (tmp_path / "membership").write_text(f"{membership}\n" if membership else "")
    quota, group = cpu_quota(tmp_path / "cgroup", tmp_path / "membership")
    assert quota == expected
    cores = Cores("one", frozenset(range(64)), quota, group)
    elsewhere = Cores("one", frozenset(range(64)), quota, "another container")
    for processes in (1, 2):
        share = min(expected / processes, 64 / (processes + 1))
        assert count_cores(cores, [cores] * processes + [elsewhere]) == max(int(share), 1)
