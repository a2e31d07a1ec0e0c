"""A whole decoder layer in one call to the compiled kernels: ``NativeLayer``.

What Transformers' ``MixtralDecoderLayer`` does module by module, done in the same order by the same kernels: norm,
projections, rotation, attention over paged keys and values, projection, norm, router, experts. The result has the same
bits; what goes away is the interpreter between them, some 0.4 ms per layer, during which memory is not read and the
threads of the next product fall asleep.

Invariants: weights are checked when the layer is made, rows and the attention's step with every call, so nothing
outside the given tensors is read or written. The layer holds on to its weights.

Rejected: one call for all layers (Transformers' loop over them costs next to nothing, and stays in charge); a PyTorch
operator of some twenty tensors (checks all of them anew in each call).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Final

import torch

from mixtral_serve.kernels.formats import TILE_ROWS, PackedMatrix
from mixtral_serve.kernels.native import library
from mixtral_serve.kernels.native_attention import AttentionCall, raise_for
from mixtral_serve.kernels.native_products import (
    KIND_NUMBERS,
    MAX_CHOSEN,
    MAX_COLS,
    PASS_ROWS,
    KernelArgumentError,
    PackedWeights,
    check_packed,
    scratch,
)
from mixtral_serve.kernels.native_rowwise import max_experts

_PROJECTIONS: Final = ("q", "k", "v", "o")
_EXPERTS: Final = ("w1", "w2", "w3")
_NORMS: Final = ("attention_norm", "experts_norm", "gate")


class _LayerWeights(ctypes.Structure):
    """``LayerWeights`` of layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, PackedWeights) for name in (*_PROJECTIONS, *_EXPERTS)),
        *((name, ctypes.c_int64) for name in ("hidden_size", "num_experts", "num_chosen", "num_inner_tiles")),
        ("epsilon", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


class _LayerCall(ctypes.Structure):
    """``LayerCall`` of layer.cpp."""

    _fields_ = (
        ("weights", ctypes.POINTER(_LayerWeights)),
        ("attention", ctypes.POINTER(AttentionCall)),
        *((name, ctypes.c_void_p) for name in ("hidden", "cosine", "sine", "out", "chosen", "scratch")),
        *((name, ctypes.c_int64) for name in ("pass_rows", "num_threads")),
    )


@functools.cache
def _kernels() -> ctypes.CDLL:
    """The library, with the types of the functions used here."""
    loaded = library()
    loaded.mixtral_layer_scratch_bytes.argtypes = [ctypes.POINTER(_LayerCall)]
    loaded.mixtral_layer_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_layer.argtypes = [ctypes.POINTER(_LayerCall)]
    loaded.mixtral_layer.restype = ctypes.c_int
    return loaded


class NativeLayer:
    """One layer's weights, and the call that computes with them.

    Args:
        dense: ``attention_norm`` and ``experts_norm`` [hidden] and ``gate`` [experts, hidden], fp32.
        packed: the projections ``q``, ``k``, ``v``, ``o``, and ``w1``, ``w2``, ``w3`` of all experts.
        num_chosen: experts per row.
        epsilon: of both norms.

    Raises:
        KernelArgumentError: tensors that do not fit each other.
        NativeUnavailableError: there are no compiled kernels.
    """

    def __init__(
        self, dense: Mapping[str, torch.Tensor], packed: Mapping[str, PackedMatrix], *, num_chosen: int, epsilon: float
    ) -> None:
        _check_weights(dense, packed, num_chosen)
        self._held = (dict(dense), dict(packed))  # addresses do not keep a tensor alive
        self._query_size, self._key_size = packed["q"].num_rows, packed["k"].num_rows
        self._hidden_size = packed["q"].num_cols
        self.num_chosen: Final = num_chosen
        self._kernels = _kernels()
        matrices = {name: PackedWeights(m.quants.data_ptr(), m.scales.data_ptr()) for name, m in packed.items()}
        self._weights = _LayerWeights(
            **{name: tensor.data_ptr() for name, tensor in dense.items()},
            **matrices,
            hidden_size=self._hidden_size,
            num_experts=dense["gate"].shape[0],
            num_chosen=num_chosen,
            num_inner_tiles=packed["w1"].quants.shape[1],
            epsilon=epsilon,
            kind=KIND_NUMBERS[packed["q"].kind],
        )

    def run(
        self,
        hidden: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        *,
        attention: AttentionCall,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the rows' keys and values, and compute the layer.

        Args:
            hidden: fp32 [rows, hidden].
            cosine: fp32 [rows, head_dim], of each row's position.
            sine: likewise.
            attention: from ``native_attention.attention_call``, for so many rows.
            chosen: int64 [rows, experts per row], dense; where given, each row's experts are written there.

        Returns:
            fp32 [rows, hidden].

        Raises:
            ValueError: an argument that does not fit the layer or the step.
        """
        rows = attention.num_rows
        _check("hidden", hidden, (rows, self._hidden_size))
        _check("cosine", cosine, (rows, attention.head_dim))
        _check("sine", sine, (rows, attention.head_dim))
        heads = attention.num_query_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        if heads != (self._query_size, self._key_size):
            raise KernelArgumentError("the step is for other heads than the layer has")
        if chosen is not None:
            fits = chosen.dtype is torch.int64 and chosen.shape == (rows, self.num_chosen) and chosen.is_contiguous()
            if not fits:
                raise KernelArgumentError(f"chosen must be dense int64 {[rows, self.num_chosen]}")
        out = torch.empty_like(hidden)
        call = _LayerCall(
            ctypes.pointer(self._weights),
            ctypes.pointer(attention),
            *(tensor.data_ptr() for tensor in (hidden, cosine, sine, out)),
            chosen=None if chosen is None else chosen.data_ptr(),
            pass_rows=PASS_ROWS,
            num_threads=torch.get_num_threads(),
        )
        call.scratch = scratch.address(self._kernels.mixtral_layer_scratch_bytes(ctypes.byref(call)))
        raise_for(self._kernels.mixtral_layer(ctypes.byref(call)))
        return out


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype is not torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
        raise KernelArgumentError(f"{name} must be dense fp32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")


def _check_weights(dense: Mapping[str, torch.Tensor], packed: Mapping[str, PackedMatrix], num_chosen: int) -> None:
    query, key = packed["q"], packed["k"]
    kind, hidden, inner = query.kind, query.num_cols, packed["w1"].num_rows
    experts = dense["gate"].shape[0]
    if not (0 < num_chosen <= min(experts, MAX_CHOSEN) and max(hidden, query.num_rows) <= MAX_COLS):
        raise KernelArgumentError("more experts per row than there are, or more columns than the kernels can add up")
    if experts > (most := max_experts()):
        raise KernelArgumentError(f"the router chooses among at most {most} experts, not {experts}")
    for name in ("attention_norm", "experts_norm"):
        _check(name, dense[name], (hidden,))
    _check("gate", dense["gate"], (experts, hidden))
    wanted = {
        "q": (query.num_rows, hidden),
        "k": (key.num_rows, hidden),
        "v": (key.num_rows, hidden),
        "o": (hidden, query.num_rows),
        "w1": (experts, inner, hidden),
        "w2": (experts, hidden, -(-inner // TILE_ROWS) * TILE_ROWS),
        "w3": (experts, inner, hidden),
    }
    for name, dims in wanted.items():
        matrix = packed[name]
        if matrix.kind != kind:
            raise KernelArgumentError(f"{name} is packed as {matrix.kind}, the others as {kind}")
        check_packed(f"{name}.", matrix.quants, matrix.scales, kind=kind, dims=dims)
