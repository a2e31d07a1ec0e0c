"""``choose``: which backend computes with the packed weights on this machine.

Owns the order of the decision: what was asked for; what can compute with these weights here at all; where several can,
a short measurement at 1 and 16 rows. The measurement is logged in one line together with its outcome.

Invariants: a backend that was asked for is taken or refused, never replaced. ``reference`` is only ever taken when
asked for. The measurement takes about 150 MB for a moment, and some 0.3 seconds.

Rejected: choosing by the CPU's name (what a library makes of a CPU changes with its versions); taking the faster one by
whatever margin: only the native kernels keep the law of equal bits, so they stay unless another is clearly faster.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from mixtral_serve.kernels.backend import Backend, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.names import BackendName, KernelChoice
from mixtral_serve.kernels.native_backend import NativeBackend
from mixtral_serve.kernels.reference_backend import ReferenceBackend
from mixtral_serve.kernels.torch_backend import TorchBackend

_log = logging.getLogger(__name__)

BACKENDS: Final[Mapping[BackendName, Callable[[], Backend]]] = {
    "native": NativeBackend,
    "torch": TorchBackend,
    "reference": ReferenceBackend,
}
PREFERENCE: Final[tuple[BackendName, ...]] = ("native", "torch")
"""What ``auto`` may take, best first among equals."""
CLEARLY_FASTER: Final = 1.15
"""By such a factor a later one of ``PREFERENCE`` must beat an earlier one."""

_NUM_ROWS: Final = (1, 16)
_MOST_ELEMENTS: Final = 32 << 20
"""More than caches hold: one row is to be measured at the memory's speed, as it will run."""
_BUDGET_S: Final = 0.3
_LEAST_ROUNDS: Final = 2
"""The first warms up."""
_MOST_ROUNDS: Final = 20


class KernelsUnavailableError(RuntimeError):
    """The weights cannot be computed with here as configured; the message says what would help."""


def choose(
    kind: Kind,
    asked: KernelChoice = "auto",
    *,
    dims: tuple[int, int] = (4096, 4096),
    backends: Mapping[BackendName, Callable[[], Backend]] = BACKENDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Backend:
    """The backend for weights of ``kind``.

    Args:
        kind: of the weights.
        asked: a backend, or ``auto``.
        dims: outputs and inputs of a typical matrix of the model; measured is one of at most 32 M weights.
        backends: what there is to choose from.
        clock: seconds, for the measurement.

    Raises:
        KernelsUnavailableError: what was asked for, or everything that could be, is missing something.
    """
    if asked != "auto":
        backend = backends[asked]()
        missing = backend.missing(kind)
        if missing is not None:
            raise KernelsUnavailableError(f"kernels = {asked}, weights = {kind}: {missing}")
        _log.info("kernels: %s, as configured", backend.label)
        return backend
    able: list[Backend] = []
    reasons: dict[BackendName, str] = {}
    for name in PREFERENCE:
        backend = backends[name]()
        missing = backend.missing(kind)
        if missing is None:
            able.append(backend)
        else:
            reasons[name] = missing
    if not able:
        # The first reason is that of the best backend, and what it takes helps the most.
        raise KernelsUnavailableError(f"weights = {kind}: {reasons[PREFERENCE[0]]}")
    if len(able) == 1:
        others = "".join(f"; {name} cannot: {reason}" for name, reason in reasons.items() if name == PREFERENCE[0])
        _log.info("kernels: %s, the only one for %s weights here%s", able[0].label, kind, others)
        return able[0]
    return _fastest(able, kind, dims, clock)


def _fastest(able: list[Backend], kind: Kind, dims: tuple[int, int], clock: Callable[[], float]) -> Backend:
    """Measure, log and decide."""
    matrix = _sample(kind, dims)
    times_s = measure([backend.linear(matrix) for backend in able], matrix.num_cols, clock)
    chosen, best_s = able[0], math.sqrt(math.prod(times_s[0]))
    for backend, each_s in zip(able[1:], times_s[1:], strict=True):
        if math.sqrt(math.prod(each_s)) * CLEARLY_FASTER < best_s:
            chosen, best_s = backend, math.sqrt(math.prod(each_s))
    _log.info(
        "kernels: %s for %s weights; ms for 1 and 16 rows times %d x %d: %s",
        chosen.label,
        kind,
        matrix.num_rows,
        matrix.num_cols,
        ", ".join(
            f"{backend.name} {one_s * 1e3:.3f} and {sixteen_s * 1e3:.3f}"
            for backend, (one_s, sixteen_s) in zip(able, times_s, strict=True)
        ),
    )
    return chosen


def measure(operations: Sequence[LinearOp], num_cols: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds of each product with 1 and with 16 rows: the least of several calls.

    They take turns, so that whatever else the machine is busy with slows all of them alike. Rows are of normal numbers,
    much like a model's: how long a product takes may depend on them.
    """
    generator = torch.Generator().manual_seed(0)
    one, sixteen = (torch.randn(num_rows, num_cols, generator=generator) for num_rows in _NUM_ROWS)
    least_s = [[math.inf, math.inf] for _ in operations]
    ends_s = clock() + _BUDGET_S
    num_rounds = 0
    while num_rounds < _LEAST_ROUNDS or (num_rounds < _MOST_ROUNDS and clock() < ends_s):
        for multiply, times_s in zip(operations, least_s, strict=True):
            for index, x in enumerate((one, sixteen)):
                started_s = clock()
                multiply(x)
                times_s[index] = min(times_s[index], clock() - started_s)
        num_rounds += 1
    return [(times_s[0], times_s[1]) for times_s in least_s]


def _sample(kind: Kind, dims: tuple[int, int]) -> PackedMatrix:
    """A matrix of these dimensions, with fewer outputs if it would be large, and any values."""
    num_rows, num_cols = dims
    matrix = PackedMatrix.empty(kind, max(1, min(num_rows, _MOST_ELEMENTS // num_cols)), num_cols)
    matrix.quants.fill_(0x99)
    matrix.fill_scales(1 / 128)
    return matrix
