"""How many threads PyTorch computes with: the configured number, clipped to what this process may really use.

Owns: the arithmetic (pure: affinity and cgroup files are arguments) and the one call that applies it.

Why clip: more threads than CPUs do not merely idle. Each product ends with a barrier, and one that waits for a thread
that is not scheduled takes many times longer than it would with fewer threads; a CPU quota that runs out in the
middle of a step freezes the whole process for the rest of the period.

A quota may be set on any cgroup above this process, and the lowest counts, so all ancestors are read. Files
that are not there (no cgroups, a container that hides its ancestors) limit nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

DEFAULT_NUM_THREADS = 8


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """How many threads to use and what decided it."""

    num_threads: int
    requested: int
    num_affinity_cpus: int
    quota_cpus: float | None
    """The lowest CPU quota of this cgroup and its ancestors, in CPUs; None where there is none."""

    def __str__(self) -> str:
        quota = "no CPU quota" if self.quota_cpus is None else f"a CPU quota of {self.quota_cpus:g}"
        plural = "" if self.num_threads == 1 else "s"
        clipped = " (clipped)" if self.num_threads < self.requested else ""
        return (
            f"computing with {self.num_threads} thread{plural}{clipped}: {self.requested} configured, "
            f"{self.num_affinity_cpus} CPUs in the affinity mask, {quota}"
        )


def plan_threads(
    requested: int = DEFAULT_NUM_THREADS,
    *,
    num_affinity_cpus: int | None = None,
    proc_cgroup: Path = Path("/proc/self/cgroup"),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
) -> ThreadPlan:
    """Clip ``requested`` (at least 1) to the affinity mask and to the CPU quota of every cgroup above this process.

    Args:
        requested: the configured number.
        num_affinity_cpus: CPUs this process may run on; None asks the kernel.
        proc_cgroup: the file that names this process's cgroups.
        cgroup_root: where the cgroup file system is mounted.
    """
    affinity = len(os.sched_getaffinity(0)) if num_affinity_cpus is None else num_affinity_cpus
    quota = min(_quotas(proc_cgroup, cgroup_root), default=None)
    limit = affinity if quota is None else min(affinity, max(1, int(quota)))
    return ThreadPlan(max(1, min(requested, limit)), requested, affinity, quota)


def apply_threads(plan: ThreadPlan) -> None:
    """Tell PyTorch, for the whole process, and say so in the log."""
    torch.set_num_threads(plan.num_threads)
    _log.info("%s", plan)


def _quotas(proc_cgroup: Path, root: Path) -> Iterator[float]:
    """Every CPU quota that binds this process, in CPUs."""
    for line in _read(proc_cgroup).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            yield from _walk(root, path, version=2)
        elif "cpu" in controllers.split(","):
            yield from _walk(root / "cpu", path, version=1)
            yield from _walk(root / controllers, path, version=1)


def _walk(root: Path, path: str, *, version: int) -> Iterator[float]:
    """Quotas of the cgroup ``path`` and of all its ancestors up to the mount point.

    ``path`` may not exist below ``root``: in a container the file system is often mounted at the container's own
    cgroup while the path is the host's. The ancestors that do exist are read all the same, and so is the root.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        directory = root.joinpath(*parts[:depth])
        quota = _quota_v2(directory) if version == 2 else _quota_v1(directory)
        if quota is not None:
            yield quota


def _quota_v2(directory: Path) -> float | None:
    words = _read(directory / "cpu.max").split()
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit() or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(directory: Path) -> float | None:
    quota = _read(directory / "cpu.cfs_quota_us").strip()
    period = _read(directory / "cpu.cfs_period_us").strip()
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    """The text of a kernel file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
