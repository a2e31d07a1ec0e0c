"""What the kernel says of memory, read from trees of our own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from mixtral_serve.machine import (
    CgroupMemory,
    MachineMemory,
    ProcessMemory,
    cgroup_memory,
    machine_memory,
    process_memory,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cgroup file system without cgroups."""
    path = tmp_path / "cgroup"
    path.mkdir()
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_process_tells_what_is_resident_and_what_is_mapped(tmp_path: Path) -> None:
    status = write(
        tmp_path / "status", "Name:\tx\nVmData:\t  300 kB\nRssAnon:\t  200 kB\nRssFile:\t 9 kB\nThreads:\t1\n"
    )
    assert process_memory(status) == ProcessMemory(anon_bytes=200 * 1024, data_bytes=300 * 1024)


def test_a_process_that_ended_has_no_memory(tmp_path: Path) -> None:
    assert process_memory(tmp_path / "gone") is None
    assert process_memory(write(tmp_path / "zombie", "Name:\tx\nState:\tZ (zombie)\n")) is None


def test_this_process_has_memory() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:  # what malloc frees may stay
        ballast[::4096] = bytes([1]) * (size // 4096)
        before = process_memory()
    assert before is not None
    assert before.anon_bytes > size
    after = process_memory()
    assert after is not None
    assert before.anon_bytes - after.anon_bytes > size * 0.9
    assert before.data_bytes - after.data_bytes > size * 0.9


def test_the_machine_tells_its_total_and_what_is_available(tmp_path: Path) -> None:
    meminfo = write(
        tmp_path / "meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  400 kB\nHugePages_Total: 0\n"
    )
    assert machine_memory(meminfo) == MachineMemory(1000 * 1024, 400 * 1024)
    assert machine_memory(write(tmp_path / "old", "MemTotal:  1000 kB\n")) == MachineMemory(1000 * 1024, 1000 * 1024)
    assert machine_memory(tmp_path / "none") is None


def test_row50_every_ancestor_counts_with_max_and_high(tmp_path: Path, root: Path) -> None:
    proc = write(tmp_path / "proc", "0::/a/b/c\n")
    write(root / "a/memory.high", "5000\n")
    write(root / "a/memory.max", "max\n")
    write(root / "a/memory.current", "900")
    write(root / "a/memory.stat", "anon 700\ninactive_file 150\nactive_file 50\nslab_reclaimable 10\n")
    write(root / "a/b/memory.max", "8000\n")
    write(root / "a/b/c/memory.max", "max\n")
    assert cgroup_memory(proc, root) == [
        CgroupMemory("/a/b/memory.max", 8000, 0),
        CgroupMemory("/a/memory.high", 5000, 690),
    ]


def test_row50_a_limit_on_the_mount_counts_when_the_path_is_the_hosts(tmp_path: Path, root: Path) -> None:
    proc = write(tmp_path / "proc", "0::/../../host/path\n")
    write(root / "memory.max", "1234")
    assert [cgroup.limit_bytes for cgroup in cgroup_memory(proc, root)] == [1234]


def test_row50_version_1_counts_its_own_limits_and_those_of_hidden_ancestors(tmp_path: Path, root: Path) -> None:
    proc = write(tmp_path / "proc", "9:name=systemd:/\n4:memory:/box\n1:cpu,cpuacct:/box\n")
    write(root / "memory/memory.limit_in_bytes", "9223372036854771712")
    write(root / "memory/box/memory.limit_in_bytes", "7000")
    write(root / "memory/box/memory.usage_in_bytes", "600")
    stat = "cache 300\nhierarchical_memory_limit 6000\ntotal_inactive_file 100\ntotal_active_file 200\n"
    write(root / "memory/box/memory.stat", stat)
    assert cgroup_memory(proc, root) == [
        CgroupMemory("/box/memory.limit_in_bytes", 7000, 300),
        CgroupMemory("/box/memory.stat", 6000, 300),
    ]


def test_without_cgroups_nothing_limits(tmp_path: Path, root: Path) -> None:
    assert cgroup_memory(tmp_path / "none", root) == []
    assert cgroup_memory(write(tmp_path / "proc", "0::/x\n"), root) == []
