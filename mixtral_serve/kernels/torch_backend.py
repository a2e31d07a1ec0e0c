"""int8 products with what PyTorch brings: FBGEMM, which needs no compiler.

Owns everything that touches PyTorch's quantised tensor types, which are deprecated and live in this file alone: they
are made while a matrix is handed over and are gone when that is done; what remains is FBGEMM's packed form of the
same integers, and the matrix it was made of is released.

FBGEMM takes one scale of activations per call. Each row is divided by its own largest magnitude before and multiplied
by it afterwards, so every row is quantised on its own. On CPUs without byte products (VNNI) FBGEMM adds pairs of
products in 16 bits, which overflow if activations use 8: there they use 7. Which it is, is found by multiplying the
largest values, not by asking for the CPU's name.

Rejected: oneDNN's engine (slower below 256 rows); ``_int_mm`` and the weight-only products (slower at every number of
rows); promising equal bits (the integer sums are the same in any batch, but what stands between the products is not).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn import functional

from mixtral_serve.kernels.backend import ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix, integers, row_scales
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.reference_backend import EIGHT_BITS
from mixtral_serve.kernels.routing import Routing

_SEVEN_BITS: Final = 63
_ENGINES: Final = ("x86", "fbgemm")
"""Names of FBGEMM among PyTorch's engines, best first; the first adds packing for newer CPUs."""


class TorchBackend:
    """Implements ``Backend`` for int8."""

    name: BackendName = "torch"
    is_row_invariant = False

    @property
    def label(self) -> str:
        """See the protocol."""
        return "torch" if self.activation_levels == EIGHT_BITS else "torch (activations of 7 bits)"

    @property
    def activation_levels(self) -> int:
        """What the largest magnitude of a row of activations becomes on this CPU."""
        return _activation_levels()

    def missing(self, kind: Kind) -> str | None:
        """See the protocol."""
        if kind == "int4":
            return (
                "int4 weights need the compiled kernels: install a C++ compiler (g++) and install"
                " mixtral-serve again; int8 weights work without"
            )
        if _engine() is None:
            return "this build of PyTorch has no FBGEMM; install a build for x86, or a C++ compiler for our own kernels"
        return None

    def linear(self, weight: PackedMatrix) -> LinearOp:
        """See the protocol; the operation holds FBGEMM's copy and not ``weight``."""
        return functools.partial(_multiply, _prepack(_dense(weight), _scales(weight)))

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        """See the protocol. Gate and up of an expert are one product."""
        gate_up, down = [], []
        for expert in range(w1.quants.shape[0]):
            gate, up = w1[expert], w3[expert]
            both = torch.cat((_dense(gate), _dense(up)))
            gate_up.append(_prepack(both, torch.cat((_scales(gate), _scales(up)))))
            down.append(_prepack(_dense(w2[expert]), _scales(w2[expert])))
        return functools.partial(_run_experts, gate_up, down)


def _run_experts(
    gate_up: list[Any], down: list[Any], hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each row's experts; ``gate_up`` and ``down`` hold FBGEMM's matrices by expert."""
    routing = Routing.of(ids, weights, len(down))
    rows = routing.sort(hidden)
    results = []
    for expert, first, end in routing.spans:
        gate, up = _multiply(gate_up[expert], rows[first:end]).chunk(2, dim=-1)
        results.append(_multiply(down[expert], functional.silu(gate).mul_(up)))
    return routing.combine(torch.cat(results))


def _multiply(packed: Any, x: torch.Tensor) -> torch.Tensor:
    """``x`` [rows, cols] fp32 times a matrix of FBGEMM's; a row that is not finite gives one that is not."""
    largest = x.abs().amax(dim=1, keepdim=True)
    # Divided, not multiplied by the inverse: that of a very small row would overflow.
    unit = x / largest.where(largest > 0, 1)
    return _multiply_units(unit, packed, _activation_levels()).mul_(largest)


def _multiply_units(unit: torch.Tensor, packed: Any, levels: int) -> torch.Tensor:
    """Activations between -1 and 1, in steps of 1 / ``levels``; FBGEMM wants them without a sign."""
    product: torch.Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        unit, 1 / levels, levels + 1, packed
    )
    return product


@functools.cache
def _activation_levels() -> int:
    """Eight bits, if the largest activations times the largest weights add up to what they should; else seven."""
    num_cols, largest = 64, 127
    packed = _prepack(torch.full((16, num_cols), largest, dtype=torch.int8), torch.ones(16))
    found = _multiply_units(torch.ones(1, num_cols), packed, EIGHT_BITS)
    is_exact = torch.allclose(found, torch.tensor(float(num_cols * largest)))
    return EIGHT_BITS if is_exact else _SEVEN_BITS


@functools.cache
def _engine() -> str | None:
    return next((name for name in _ENGINES if name in torch.backends.quantized.supported_engines), None)


@contextmanager
def _quantised_tensors() -> Iterator[None]:
    """FBGEMM as the engine, and no word about the deprecation of its tensor types."""
    before, engine = torch.backends.quantized.engine, _engine()
    assert engine is not None, "asked for although it is missing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


def _prepack(values: torch.Tensor, scales: torch.Tensor) -> Any:
    """FBGEMM's form of int8 ``values`` [rows, cols] with fp64 ``scales`` [rows]."""
    with _quantised_tensors():
        zero_points = torch.zeros(values.shape[0], dtype=torch.int64)
        quantised = torch._make_per_channel_quantized_tensor(values, scales, zero_points, 0)
        return torch.ops.quantized.linear_prepack(quantised, None)


def _dense(matrix: PackedMatrix) -> torch.Tensor:
    """int8 [num_rows, num_cols], without padding."""
    return integers(matrix)[: matrix.num_rows, : matrix.num_cols].contiguous()


def _scales(matrix: PackedMatrix) -> torch.Tensor:
    """fp64 [num_rows]."""
    return row_scales(matrix)[: matrix.num_rows, 0]
