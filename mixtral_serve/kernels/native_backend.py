"""Our own compiled kernels as a ``Backend``: int4 and int8, on weights as they are packed, nothing copied.

Owns nothing but the wiring: the operations are ``native_products``'.
"""

from __future__ import annotations

from typing import Final

import torch

import mixtral_serve.kernels.native_products  # noqa: F401 - registers the operators
from mixtral_serve.kernels.backend import ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.native import NativeUnavailableError, library

_ops: Final = torch.ops.mixtral_serve


class NativeBackend:
    """Implements ``Backend`` where the compiled library is there."""

    name: BackendName = "native"
    is_row_invariant = True

    def missing(self, kind: Kind) -> str | None:  # noqa: ARG002 - it computes with every kind
        """See the protocol."""
        try:
            library()
        except NativeUnavailableError as error:
            return str(error)
        return None

    def linear(self, weight: PackedMatrix) -> LinearOp:
        """See the protocol; the operation reads ``weight`` where it lies."""
        op = _ops.linear_int4.default if weight.kind == "int4" else _ops.linear_int8.default
        quants, scales, num_rows = weight.quants, weight.scales, weight.num_rows
        return lambda x: op(x, quants, scales, num_rows)

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        """See the protocol; the operation reads the weights where they lie."""
        op = _ops.experts_int4.default if w1.kind == "int4" else _ops.experts_int8.default
        packed = (w1.quants, w1.scales, w2.quants, w2.scales, w3.quants, w3.scales)

        def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = op(hidden, ids, weights, *packed)
            return out

        return run
