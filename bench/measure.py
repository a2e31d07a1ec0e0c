"""Quantiles of a sample, and the facts of the machine that every recorded figure needs beside it.

Owns: ``quantile``, ``Quantiles``, ``Machine``. Pure, but for reading what machine this is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


def quantile(ascending: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of a non-empty ascending sample lies, interpolated linearly."""
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Median and tail. None of an empty sample."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, sample: Iterable[float]) -> Quantiles:
        """Of values in any order."""
        ascending = sorted(sample)
        if not ascending:
            return cls(None, None, None)
        return cls(quantile(ascending, 0.50), quantile(ascending, 0.95), quantile(ascending, 0.99))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a figure was measured."""

    cpu: str
    num_cpus: int
    """Processors that this process may use."""
    system: str
    python: str

    @classmethod
    def this(cls) -> Machine:
        """The machine at hand."""
        return cls(
            cpu=_cpu_name() or platform.processor() or platform.machine(),
            num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
            system=platform.platform(terse=True),
            python=platform.python_version(),
        )


def _cpu_name() -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return None
    for line in path.read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None
