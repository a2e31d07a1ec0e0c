"""What of this machine decides the figures: its vector instructions, and how fast it reads memory now.

Owns: ``instruction_sets`` and ``read_bandwidth``, which bounds a decode step. The latter sums numbers that are far more
than any cache holds with as many threads as the contenders use; the fastest of several passes counts, since whatever
else runs can only slow one down.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import torch

_FLAGS: Final = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
_READ_BYTES: Final = 1 << 30
_PASSES: Final = 5


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of the processor that kernels choose by; empty where the system does not tell."""
    if not cpuinfo.exists():
        return []
    for line in cpuinfo.read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            has = set(value.split())
            return [flag for flag in _FLAGS if flag in has]
    return []


def read_bandwidth(num_threads: int, *, num_bytes: int = _READ_BYTES) -> float:
    """Bytes per second, now."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        numbers = torch.ones(num_bytes // 4, dtype=torch.float32)
        fastest_s = min(_seconds(numbers) for _ in range(_PASSES))
    finally:
        torch.set_num_threads(before)
    return num_bytes / fastest_s


def _seconds(numbers: torch.Tensor) -> float:
    began_s = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - began_s
