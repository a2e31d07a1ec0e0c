"""Speed of the kernels against this machine's limits: ``python -m bench.kernels --json FILE``.

Every kernel runs at Mixtral-8x7B's width for several numbers of rows, on every backend and, for our own, with every
instruction set. Beside each stand the two things that bound it: a plain read of as many bytes as it must read, and
integer products on registers alone, measured in turns with it so that a busy machine slows all alike; of each the
median is taken.

``percent_of_bandwidth`` counts the bytes of the weights that are touched (of experts: those that somebody chose),
``percent_of_peak`` the multiplications and additions of the products, against the peak of the same instruction set.
The sparse case (one row) should be near the first limit, the dense one (256 rows) near the second.

What would take seconds per call (the portable kernels with many rows) is left out.

To add a kernel, write a function that yields ``Case`` and name it in ``SUITES``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from bench.environment import run_as_engine
from bench.measure import Machine
from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.machine_limits import multiply_registers, read_memory
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.native import Isa, best_isa, limited_to
from mixtral_serve.kernels.registry import BACKENDS
from mixtral_serve.kernels.self_test import settle_isa
from mixtral_serve.model.native_attention import native_step
from mixtral_serve.model.native_kv_cache import NativeKVCache
from mixtral_serve.model.shape import KVDtype, ModelShape
from scheduler.plan import ScheduledSlice
from scheduler.request import BlockId, RequestId

HIDDEN: Final = 4096
INTERMEDIATE: Final = 14336
NUM_EXPERTS: Final = 8
TOP_K: Final = 2
NUM_ROWS: Final = (1, 4, 16, 64, 256)
KINDS: Final[tuple[Kind, ...]] = ("int4", "int8")
DEFAULT_BACKENDS: Final[tuple[BackendName, ...]] = ("native", "torch")
"""``reference`` can be asked for; it is the oracle and takes seconds per call."""
CONTEXT: Final = 32768
"""Tokens of keys and values that attention reads, all rows together."""
BLOCK_SIZE: Final = 16
ATTENTION_SHAPE: Final = ModelShape(
    vocab_size=32000,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_layers=1,
    num_query_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=NUM_EXPERTS,
    num_experts_per_token=TOP_K,
    max_model_len=CONTEXT,
)
NUM_COPIES: Final = 4
"""Matrices a linear takes in turns: together they are larger than a cache, as a model's are."""
FILL: Final = 1 << 20
"""Bytes of random weights that are repeated to fill a matrix."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one backend with one number of rows."""

    kernel: str
    backend: str
    num_rows: int
    isa: Isa
    """What our own kernels and both limits are held to meanwhile."""
    run: Callable[[], object]
    num_bytes: int
    """That it must read from memory, at least."""
    num_operations: int
    """Multiplications and additions of integers; 0 if it has none worth counting."""
    reads: Sequence[torch.Tensor]
    """Memory of the kind that it reads, for the plain read; taken in turns."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a case took."""

    kernel: str
    backend: str
    num_rows: int
    seconds: float
    percent_of_bandwidth: float
    percent_of_peak: float


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Calls one after the other, one per call."""
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(calls)
        return calls[state["next"]]()

    return call


def backends(kind: Kind, chosen: Sequence[BackendName]) -> Iterator[tuple[str, Backend, Isa]]:
    """Label, backend and instruction set of those that can: our own with each set, best first."""
    for name in chosen:
        backend = BACKENDS[name]()
        if backend.missing(kind) is not None:
            continue
        if name != "native":
            yield name, backend, best_isa()
            continue
        for isa in sorted(Isa, reverse=True):
            if isa <= best_isa():
                yield f"native ({isa.name.lower()})", backend, isa


def random_matrix(kind: Kind, num_rows: int, num_cols: int, *, num_matrices: int | None = None) -> PackedMatrix:
    """Packed weights with random integers and equal scales."""
    matrix = PackedMatrix.empty(kind, num_rows, num_cols, num_matrices=num_matrices)
    piece = torch.randint(1, 256, (FILL,), dtype=torch.uint8)
    quants = matrix.quants.view(-1)
    for first in range(0, quants.numel(), FILL):
        part = quants[first : first + FILL]
        part.copy_(piece[: part.numel()])
    matrix.fill_scales(1 / 128)
    return matrix


def linear_cases(kind: Kind, chosen: Sequence[BackendName]) -> Iterator[Case]:
    """One matrix of an expert, [14336, 4096]."""
    matrices = [random_matrix(kind, INTERMEDIATE, HIDDEN) for _ in range(NUM_COPIES)]
    for label, backend, isa in backends(kind, chosen):
        operations = [backend.linear(matrix) for matrix in matrices]
        for num_rows in NUM_ROWS:
            x = torch.randn(num_rows, HIDDEN)
            yield Case(
                kernel=f"linear_{kind}",
                backend=label,
                num_rows=num_rows,
                isa=isa,
                run=in_turn([functools.partial(operation, x) for operation in operations]),
                num_bytes=matrices[0].num_bytes,
                num_operations=2 * num_rows * INTERMEDIATE * HIDDEN,
                reads=[matrix.quants for matrix in matrices],
            )


def even_routing(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of eight experts per row, all as often as can be, and their weights."""
    first = torch.arange(num_rows) * TOP_K % NUM_EXPERTS
    ids = torch.stack((first, (first + 1) % NUM_EXPERTS), dim=1)
    return ids, torch.full((num_rows, TOP_K), 1 / TOP_K)


def experts_cases(kind: Kind, chosen: Sequence[BackendName]) -> Iterator[Case]:
    """The experts of a layer; every row chooses two."""
    w1, w3 = (random_matrix(kind, INTERMEDIATE, HIDDEN, num_matrices=NUM_EXPERTS) for _ in range(2))
    w2 = random_matrix(kind, HIDDEN, INTERMEDIATE, num_matrices=NUM_EXPERTS)
    per_expert = (w1.num_bytes + w2.num_bytes + w3.num_bytes) // NUM_EXPERTS
    for label, backend, isa in backends(kind, chosen):
        operation = backend.experts(w1, w2, w3)
        for num_rows in NUM_ROWS:
            hidden, (ids, weights) = torch.randn(num_rows, HIDDEN), even_routing(num_rows)
            yield Case(
                kernel=f"experts_{kind}",
                backend=label,
                num_rows=num_rows,
                isa=isa,
                run=functools.partial(operation, hidden, ids, weights),
                num_bytes=per_expert * min(TOP_K * num_rows, NUM_EXPERTS),
                num_operations=2 * num_rows * TOP_K * 3 * INTERMEDIATE * HIDDEN,
                reads=[matrix.quants[expert] for matrix in (w1, w2, w3) for expert in range(NUM_EXPERTS)],
            )


def attention_cases(dtype: KVDtype, chosen: Sequence[BackendName]) -> Iterator[Case]:
    """One layer's decodes; rows share ``CONTEXT`` tokens of keys and values, so that all cases read as much.

    Nothing of attention goes beyond AVX2. The fp32 products are not counted: the peak is that of integers.
    """
    if "native" not in chosen or BACKENDS["native"]().missing("int8") is not None:
        return
    shape = ATTENTION_SHAPE
    cache = NativeKVCache(shape, num_blocks=CONTEXT // BLOCK_SIZE + 1, block_size=BLOCK_SIZE, dtype=dtype)
    for num_rows in NUM_ROWS:
        length = CONTEXT // num_rows
        slices = []
        for row in range(num_rows):
            first = 1 + row * length // BLOCK_SIZE
            table = [BlockId(block) for block in range(first, first + length // BLOCK_SIZE)]
            tokens = array("i", [1]) * length
            slices.append((row, ScheduledSlice(RequestId(f"r{row}"), length - 1, 1, tokens, table, 1, True, 0)))
        slots = array("q", (part.block_table[-1] * BLOCK_SIZE + BLOCK_SIZE - 1 for _, part in slices))
        step = native_step(cache, slices, slots, sliding_window=None)
        heads = (shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads)
        queries, keys, values = (torch.randn(num_rows, num, shape.head_dim) for num in heads)
        for isa in sorted((isa for isa in Isa if isa <= min(best_isa(), Isa.AVX2)), reverse=True):
            yield Case(
                kernel=f"attention_{dtype}",
                backend=f"native ({isa.name.lower()})",
                num_rows=num_rows,
                isa=isa,
                run=functools.partial(step.attend, 0, (queries, keys, values), shape.head_dim**-0.5, None),
                num_bytes=cache.num_bytes,
                num_operations=0,
                reads=[cache.keys.view(torch.uint8), cache.values.view(torch.uint8)],
            )


SUITES: Final[dict[str, Callable[[Sequence[BackendName]], Iterator[Case]]]] = {
    "linear_int4": functools.partial(linear_cases, "int4"),
    "linear_int8": functools.partial(linear_cases, "int8"),
    "experts_int4": functools.partial(experts_cases, "int4"),
    "experts_int8": functools.partial(experts_cases, "int8"),
    "attention_bf16": functools.partial(attention_cases, "bf16"),
    "attention_int8": functools.partial(attention_cases, "int8"),
}
"""Every kernel's cases; a suite's memory is free when it ends."""


def seconds_of(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def measure(case: Case, budget_s: float) -> Row:
    """Time the case in turns with both limits, for about ``budget_s`` and at least three rounds."""
    read = in_turn([functools.partial(read_memory, tensor) for tensor in case.reads])
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    with limited_to(case.isa):
        case.run()
        num_operations = multiply_registers()
        ends_s = time.monotonic() + budget_s
        while len(times[0]) < 3 or time.monotonic() < ends_s:
            for call, sample in zip((case.run, read, multiply_registers), times, strict=True):
                sample.append(seconds_of(call))
    seconds, read_s, multiply_s = (statistics.median(sample) for sample in times)
    bandwidth, peak = case.reads[0].nbytes / read_s, num_operations / multiply_s
    return Row(
        case.kernel,
        case.backend,
        case.num_rows,
        seconds,
        100 * case.num_bytes / seconds / bandwidth,
        100 * case.num_operations / seconds / peak,
    )


def run(cases: Iterable[Case], budget_s: float, *, most_s: float) -> Iterator[Row]:
    """Rows as they are measured. What would take longer than ``most_s`` per call, by its fewer rows, is left out."""
    before: dict[str, Row] = {}
    for case in cases:
        last = before.get(case.backend)
        if last is None or last.seconds * case.num_rows / last.num_rows <= most_s:
            before[case.backend] = measure(case, budget_s)
            yield before[case.backend]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print as it goes, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Speed of the kernels.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--kernels", nargs="+", choices=list(SUITES), default=list(SUITES), help="only these")
    parser.add_argument(
        "--backends", nargs="+", choices=list(BACKENDS), default=list(DEFAULT_BACKENDS), help="default: native torch"
    )
    parser.add_argument("--budget-s", type=float, default=0.5, help="seconds per row (default %(default)s)")
    parser.add_argument(
        "--most-s", type=float, default=3.0, help="leave out what would take longer per call (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    settle_isa()
    rows = []
    print(f"{'kernel':16}{'backend':24}{'rows':>5}{'ms':>11}{'bandwidth':>11}{'peak':>8}")
    for name in options.kernels:
        for row in run(SUITES[name](options.backends), options.budget_s, most_s=options.most_s):
            rows.append(asdict(row))
            print(
                f"{row.kernel:16}{row.backend:24}{row.num_rows:5}{row.seconds * 1e3:11.3f}"
                f"{row.percent_of_bandwidth:10.1f}%{row.percent_of_peak:7.1f}%",
                flush=True,
            )
    if options.json is not None:
        report: dict[str, Any] = {
            "machine": asdict(Machine.this()),
            "num_threads": torch.get_num_threads(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_as_engine()
    main()
