"""All decoder layers of a model in one call to the compiled kernels: ``NativeLayers``.

What Transformers' ``MixtralDecoderLayer`` does module by module, done in the same order by the same kernels: norm,
projections, rotation, attention over paged keys and values, projection, norm, router, experts. The result has the same
bits; what goes away is the interpreter between modules, some 0.4 ms per layer, and between layers, 0.2 to 0.3 ms,
during which memory is not read, the threads of the next product fall asleep, and caches fill with something else.

Invariants: weights are checked when they are handed over, rows and the attention's step with every call, so nothing
outside the given tensors is read or written, if the storage is that which the step was made for: of it only addresses
are known here. The weights are held on to.

Rejected: a PyTorch operator of some twenty tensors per layer (checks all of them anew in each call).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch

from mixtral_serve.kernels.formats import TILE_ROWS, PackedMatrix
from mixtral_serve.kernels.native import library
from mixtral_serve.kernels.native_attention import AttentionCall, LayerStorage, raise_for
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
    """``LayerWeights`` of layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, PackedWeights) for name in (*_PROJECTIONS, *_EXPERTS)),
        *((name, ctypes.c_int64) for name in ("hidden_size", "num_experts", "num_chosen", "num_inner_tiles")),
        ("epsilon", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


class _LayersCall(ctypes.Structure):
    """``LayersCall`` of layers.cpp."""

    _fields_ = (
        ("weights", ctypes.POINTER(_LayerWeights)),
        ("storage", ctypes.POINTER(LayerStorage)),
        ("attention", ctypes.POINTER(AttentionCall)),
        *((name, ctypes.c_void_p) for name in ("hidden", "cosine", "sine", "out", "chosen", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_layers", "pass_rows", "num_threads")),
    )


@functools.cache
def _kernels() -> ctypes.CDLL:
    """The library, with the types of the functions used here."""
    loaded = library()
    loaded.mixtral_layers_scratch_bytes.argtypes = [ctypes.POINTER(_LayersCall)]
    loaded.mixtral_layers_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_layers.argtypes = [ctypes.POINTER(_LayersCall)]
    loaded.mixtral_layers.restype = ctypes.c_int
    return loaded


class LayerTensors(NamedTuple):
    """One layer's weights."""

    dense: Mapping[str, torch.Tensor]
    """``attention_norm`` and ``experts_norm`` [hidden] and ``gate`` [experts, hidden], fp32."""
    packed: Mapping[str, PackedMatrix]
    """The projections ``q``, ``k``, ``v``, ``o``, and ``w1``, ``w2``, ``w3`` of all experts."""


class NativeLayers:
    """The weights of all layers, and the call that computes with them.

    Args:
        layers: from the first to the last, at least one; all of the same shapes.
        num_chosen: experts per row.
        epsilon: of all norms.

    Raises:
        KernelArgumentError: tensors that do not fit each other.
        NativeUnavailableError: there are no compiled kernels.
    """

    def __init__(self, layers: Sequence[LayerTensors], *, num_chosen: int, epsilon: float) -> None:
        if not layers:
            raise KernelArgumentError("there are no layers")
        for index, layer in enumerate(layers):
            _check_weights(layer.dense, layer.packed, num_chosen)
            if _dims(layer) != _dims(layers[0]):
                raise KernelArgumentError(f"layer {index} has other shapes than layer 0, or is packed otherwise")
        first = layers[0].packed
        self._held = tuple(LayerTensors(dict(dense), dict(packed)) for dense, packed in layers)
        """Addresses do not keep a tensor alive."""
        self._query_size, self._key_size = first["q"].num_rows, first["k"].num_rows
        self._hidden_size = first["q"].num_cols
        self.num_layers: Final = len(layers)
        self.num_chosen: Final = num_chosen
        self._kernels = _kernels()
        self._weights = (_LayerWeights * len(layers))(*(_addresses(layer, num_chosen, epsilon) for layer in layers))

    def run(
        self,
        hidden: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        *,
        attention: AttentionCall,
        storage: ctypes.Array[LayerStorage],
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the rows' keys and values, and compute all layers.

        Args:
            hidden: fp32 [rows, hidden].
            cosine: fp32 [rows, head_dim], of each row's position.
            sine: likewise.
            attention: from ``native_attention.attention_call``, for so many rows.
            storage: each layer's keys and values, all of the form that ``attention`` was made with.
            chosen: int64 [layers, rows, experts per row], dense; where given, each row's experts are written there.

        Returns:
            fp32 [rows, hidden].

        Raises:
            ValueError: an argument that does not fit the layers or the step.
        """
        rows = attention.num_rows
        _check("hidden", hidden, (rows, self._hidden_size))
        _check("cosine", cosine, (rows, attention.head_dim))
        _check("sine", sine, (rows, attention.head_dim))
        heads = attention.num_query_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        if heads != (self._query_size, self._key_size):
            raise KernelArgumentError("the step is for other heads than the layers have")
        if len(storage) != self.num_layers:
            raise KernelArgumentError(f"keys and values of {len(storage)} layers do not fit {self.num_layers} layers")
        if chosen is not None:
            dims = (self.num_layers, rows, self.num_chosen)
            if chosen.dtype is not torch.int64 or chosen.shape != dims or not chosen.is_contiguous():
                raise KernelArgumentError(f"chosen must be dense int64 {list(dims)}")
        out = torch.empty_like(hidden)
        call = _LayersCall(
            self._weights,
            storage,
            ctypes.pointer(attention),
            *(tensor.data_ptr() for tensor in (hidden, cosine, sine, out)),
            chosen=None if chosen is None else chosen.data_ptr(),
            num_layers=self.num_layers,
            pass_rows=PASS_ROWS,
            num_threads=torch.get_num_threads(),
        )
        call.scratch = scratch.address(self._kernels.mixtral_layers_scratch_bytes(ctypes.byref(call)))
        raise_for(self._kernels.mixtral_layers(ctypes.byref(call)))
        return out


def _addresses(layer: LayerTensors, num_chosen: int, epsilon: float) -> _LayerWeights:
    packed = layer.packed
    return _LayerWeights(
        **{name: tensor.data_ptr() for name, tensor in layer.dense.items()},
        **{name: PackedWeights(m.quants.data_ptr(), m.scales.data_ptr()) for name, m in packed.items()},
        hidden_size=packed["q"].num_cols,
        num_experts=layer.dense["gate"].shape[0],
        num_chosen=num_chosen,
        num_inner_tiles=packed["w1"].quants.shape[1],
        epsilon=epsilon,
        kind=KIND_NUMBERS[packed["q"].kind],
    )


def _dims(layer: LayerTensors) -> tuple[object, ...]:
    """What must be alike in all layers; the rest follows from it."""
    packed = layer.packed
    experts = layer.dense["gate"].shape[0]
    return (
        packed["q"].kind,
        packed["q"].num_cols,
        packed["q"].num_rows,
        packed["k"].num_rows,
        packed["w1"].num_rows,
        experts,
    )


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
