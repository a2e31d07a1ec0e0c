"""What the kernel says of memory: this machine's, this process's, and the limits of the cgroups above it.

Owns: the readers of ``/proc`` and of cgroup files, and the values they give. It decides nothing, and every path is an
argument, so that tests hand in a tree of their own.

A limit may stand on any cgroup above the process, and the lowest binds, so all ancestors are read, in version 2 and
in version 1. Files that are not there (no cgroups, a container that hides its ancestors, another operating system)
limit nothing and measure nothing.

Rejected: a library (psutil's "rss" counts file pages, which the kernel takes back when it likes), and reading
``smaps_rollup`` (exact, and a hundred times slower with tens of gigabytes mapped).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

OWN_STATUS: Final = Path("/proc/self/status")
MEMINFO: Final = Path("/proc/meminfo")
PROC_CGROUP: Final = Path("/proc/self/cgroup")
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

_KILOBYTES: Final = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_NO_LIMIT: Final = 1 << 60
"""Version 1 writes "unlimited" as the largest multiple of a page; nothing real comes near."""


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process at one moment, in bytes."""

    anon_bytes: int
    """Anonymous pages that are resident: what nothing but the process itself can give back."""
    data_bytes: int
    """Private writable mappings, touched or not: what ``RLIMIT_DATA`` counts."""


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """The machine at one moment, in bytes."""

    total_bytes: int
    available_bytes: int
    """What could be taken without swapping, as the kernel estimates it."""


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """One cgroup that has a limit."""

    name: str
    """The file that holds the limit, as a path below the cgroup file system."""
    limit_bytes: int
    used_bytes: int
    """What its processes hold, without the file pages that the kernel can drop."""


def process_memory(status: Path = OWN_STATUS) -> ProcessMemory | None:
    """The memory of the process that ``status`` belongs to; None when it has ended or cannot be read."""
    fields = _kilobytes(status)
    if "RssAnon" not in fields or "VmData" not in fields:
        return None  # a process that has ended and waits to be collected has no memory
    return ProcessMemory(fields["RssAnon"], fields["VmData"])


def machine_memory(meminfo: Path = MEMINFO) -> MachineMemory | None:
    """The machine's memory; None where the kernel does not say."""
    fields = _kilobytes(meminfo)
    if "MemTotal" not in fields:
        return None
    return MachineMemory(fields["MemTotal"], fields.get("MemAvailable", fields["MemTotal"]))


def cgroup_memory(proc_cgroup: Path = PROC_CGROUP, root: Path = CGROUP_ROOT) -> list[CgroupMemory]:
    """Every cgroup above the process that ``proc_cgroup`` belongs to, itself included, which limits its memory."""
    found: list[CgroupMemory] = []
    for version, mount, directory in _directories(proc_cgroup, root):
        limits = _limits_v2(directory) if version == 2 else _limits_v1(directory)
        for file, limit_bytes in limits:
            used = _used_v2(directory) if version == 2 else _used_v1(directory)
            found.append(CgroupMemory(_shown(directory / file, mount), limit_bytes, used))
    return found


def _directories(proc_cgroup: Path, root: Path) -> Iterator[tuple[Literal[1, 2], Path, Path]]:
    """Version, mount point and directory of each cgroup that accounts the process's memory, innermost first.

    The path may not exist below the mount: in a container the file system is often mounted at the container's own
    cgroup while the path is the host's. The ancestors that do exist are read all the same, and so is the mount.
    """
    for line in _read(proc_cgroup).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts: list[tuple[Literal[1, 2], Path]] = []
        if controllers == "":
            mounts = [(2, root), (2, root / "unified")]
        elif "memory" in controllers.split(","):
            mounts = [(1, root / mount) for mount in dict.fromkeys(("memory", controllers))]
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for version, mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield version, mount, mount.joinpath(*parts[:depth])


def _limits_v2(directory: Path) -> Iterator[tuple[str, int]]:
    for file in ("memory.max", "memory.high"):
        text = _read(directory / file).strip()
        if text.isdigit():
            yield file, int(text)


def _limits_v1(directory: Path) -> Iterator[tuple[str, int]]:
    text = _read(directory / "memory.limit_in_bytes").strip()
    if text.isdigit() and int(text) < _NO_LIMIT:
        yield "memory.limit_in_bytes", int(text)
    # The kernel's own minimum over the ancestors, also over those that a container does not show.
    hierarchical = _stat(directory).get("hierarchical_memory_limit", _NO_LIMIT)
    if hierarchical < _NO_LIMIT:
        yield "memory.stat", hierarchical


def _used_v2(directory: Path) -> int:
    stat = _stat(directory)
    droppable = stat.get("inactive_file", 0) + stat.get("active_file", 0) + stat.get("slab_reclaimable", 0)
    return max(0, _number(directory / "memory.current") - droppable)


def _used_v1(directory: Path) -> int:
    stat = _stat(directory)
    droppable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return max(0, _number(directory / "memory.usage_in_bytes") - droppable)


def _stat(directory: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(directory / "memory.stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0


def _kilobytes(path: Path) -> dict[str, int]:
    """Field -> bytes."""
    return {name: int(value) * 1024 for name, value in _KILOBYTES.findall(_read(path))}


def _shown(path: Path, mount: Path) -> str:
    return "/" + path.relative_to(mount).as_posix()


def _read(path: Path) -> str:
    """The text of a kernel file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
