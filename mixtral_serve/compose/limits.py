"""How much memory a server may plan with on this machine: the lowest of the cap, the cgroups and the machine itself.

Owns: ``tightest_limit``. The numbers come from the kernel's files, whose places are arguments.

A cgroup counts with ``memory.high`` as well as ``memory.max``: beyond the first the kernel slows the processes down to
a crawl, beyond the second it kills them. The machine counts with all its memory less a reserve for the kernel and for
whatever else runs. What happens to be available at the start does not count: it changes from second to second, and a
restart beside a predecessor that is still ending would then plan with next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mixtral_serve import machine

LEAST_RESERVE_BYTES: Final = 256_000_000
_RESERVE_SHARE: Final = 50


@dataclass(frozen=True, slots=True)
class Limit:
    """A number of bytes, and what sets it."""

    name: str
    num_bytes: int


def tightest_limit(
    cap_bytes: int,
    *,
    meminfo: Path = machine.MEMINFO,
    proc_cgroup: Path = machine.PROC_CGROUP,
    cgroup_root: Path = machine.CGROUP_ROOT,
) -> Limit:
    """The limit that binds; the cap where nothing is lower."""
    limits = [Limit("cap", cap_bytes)]
    limits += [
        Limit(f"limit of cgroup {cgroup.name}", cgroup.limit_bytes)
        for cgroup in machine.cgroup_memory(proc_cgroup, cgroup_root)
    ]
    memory = machine.machine_memory(meminfo)
    if memory is not None:
        limits.append(Limit("memory of this machine, less a reserve", usable_bytes(memory.total_bytes)))
    return min(limits, key=lambda limit: limit.num_bytes)


def usable_bytes(total_bytes: int) -> int:
    """What a machine with ``total_bytes`` has for a server: all but a fiftieth, and all but 256 MB at least."""
    return max(0, total_bytes - max(LEAST_RESERVE_BYTES, total_bytes // _RESERVE_SHARE))
