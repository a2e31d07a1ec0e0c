"""Our own compiled kernels as a ``Backend``: int4 and int8, on weights as they are packed, nothing copied.

Owns nothing but the wiring: the operations are ``native_products``'.
"""

from __future__ import annotations

from mixtral_serve.kernels.backend import ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.native import NativeUnavailableError, best_isa, library
from mixtral_serve.kernels.native_products import NativeExperts, NativeLinear


class NativeBackend:
    """Implements ``Backend`` where the compiled library is there."""

    name: BackendName = "native"
    is_row_invariant = True

    @property
    def label(self) -> str:
        """The name, and the instructions that this CPU computes with."""
        return f"{self.name} ({best_isa().name.lower()})"

    def missing(self, kind: Kind) -> str | None:  # noqa: ARG002 - it computes with every kind
        """See the protocol."""
        try:
            library()
        except NativeUnavailableError as error:
            return str(error)
        return None

    def linear(self, weight: PackedMatrix) -> LinearOp:
        """See the protocol; the operation reads ``weight`` where it lies."""
        return NativeLinear(
            weight.kind, weight.quants, weight.scales, num_rows=weight.num_rows, num_cols=weight.num_cols
        )

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        """See the protocol; the operation reads the weights where they lie."""
        tensors = [tensor for matrix in (w1, w2, w3) for tensor in (matrix.quants, matrix.scales)]
        return NativeExperts(w1.kind, tensors, hidden_size=w1.num_cols)
