"""The limit that binds: the cap, the lowest cgroup above, or the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_serve.compose.limits import Limit, tightest_limit

GB = 1_000_000_000


class Machine:
    """Kernel files that say what a test wants."""

    def __init__(self, path: Path) -> None:
        self.root = path / "cgroup"
        self.meminfo = path / "meminfo"
        self.proc = path / "proc"
        self.proc.write_text("0::/outer/inner\n")
        self.has(256 * GB)

    def has(self, total_bytes: int) -> None:
        self.meminfo.write_text(f"MemTotal: {total_bytes // 1024} kB\n")

    def limits(self, directory: str, file: str, num_bytes: int) -> None:
        path = self.root / directory
        path.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(f"{num_bytes}\n")

    def tightest(self, cap_bytes: int = 90 * GB) -> Limit:
        return tightest_limit(cap_bytes, meminfo=self.meminfo, proc_cgroup=self.proc, cgroup_root=self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_cap_binds_on_a_large_machine(machine: Machine) -> None:
    assert machine.tightest() == Limit("cap", 90 * GB)


def test_row50_the_lowest_limit_of_all_ancestors_binds(machine: Machine) -> None:
    machine.limits("outer", "memory.max", 40 * GB)
    machine.limits("outer/inner", "memory.max", 60 * GB)
    assert machine.tightest() == Limit("limit of cgroup /outer/memory.max", 40 * GB)
    machine.limits("outer/inner", "memory.high", 30 * GB)
    assert machine.tightest() == Limit("limit of cgroup /outer/inner/memory.high", 30 * GB)
    assert machine.tightest(20 * GB) == Limit("cap", 20 * GB)


def test_row50_the_machine_binds_with_a_reserve(machine: Machine) -> None:
    machine.has(64_000_000_000)
    limit = machine.tightest()
    assert limit.name == "memory of this machine, less a reserve"
    assert 62 * GB < limit.num_bytes < 63 * GB
    machine.has(200_000_000)
    assert machine.tightest().num_bytes == 0


def test_where_the_kernel_says_nothing_the_cap_binds(tmp_path: Path) -> None:
    nowhere = tmp_path / "none"
    assert tightest_limit(5, meminfo=nowhere, proc_cgroup=nowhere, cgroup_root=nowhere) == Limit("cap", 5)
