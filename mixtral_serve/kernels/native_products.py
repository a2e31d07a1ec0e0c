"""Products of fp32 rows with quantised weights on the compiled kernels, as PyTorch operators.

    mixtral_serve::linear_int8, linear_int4      rows times one matrix
    mixtral_serve::experts_int8, experts_int4    Mixtral's experts: w2(silu(w1 x) * (w3 x)), weighted and added

and, for who calls with the same weights again and again, ``NativeLinear`` and ``NativeExperts``, which the operators
are made of.

Invariants: arguments are checked here before their addresses are passed on, so that no tensor can make the kernels
read or write outside it; a row's result has the same bits alone, in any batch and for any number of threads, on every
instruction set. Rows are worked on in passes of at most ``PASS_ROWS``, which bounds the scratch memory; it is kept per
thread, as large as the largest pass so far.

Rejected: scratch memory allocated per call (the kernel would zero fresh pages for longer than a decode step computes);
``torch.library.custom_op`` (slower than operators that are registered directly).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Final

import torch

from mixtral_serve.kernels.formats import GROUP_COLS, SCALE_BYTES, TILE_ROWS, Kind, int4_tile_scale_bytes
from mixtral_serve.kernels.native import library

PASS_ROWS: Final = 512
"""Rows worked on at a time; more are worked on in several passes."""
MAX_COLS: Final = 131072
"""Columns of a matrix: more could exceed the kernels' 32-bit sums."""
MAX_CHOSEN: Final = 64
"""Experts per row."""

KIND_NUMBERS: Final[dict[Kind, int]] = {"int8": 0, "int4": 1}
_SCALE_DTYPES: Final[dict[Kind, torch.dtype]] = {"int8": torch.float32, "int4": torch.uint8}


class KernelArgumentError(ValueError):
    """A tensor that an operator cannot work on; the message names the argument and what it must be."""


class PackedWeights(ctypes.Structure):
    """``PackedWeights`` of operations.h."""

    _fields_ = (("quants", ctypes.c_void_p), ("scales", ctypes.c_void_p))


class _LinearWeights(ctypes.Structure):
    """``LinearWeights`` of operations.h."""

    _fields_ = (
        ("weights", PackedWeights),
        *((name, ctypes.c_int64) for name in ("num_cols", "num_outputs")),
        ("kind", ctypes.c_int32),
    )


class _ExpertsCall(ctypes.Structure):
    """``ExpertsCall`` of operations.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "ids", "weights")),
        *((name, PackedWeights) for name in ("w1", "w2", "w3")),
        *((name, ctypes.c_void_p) for name in ("out", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_cols", "k", "num_experts", "num_inner_tiles")),
        *((name, ctypes.c_int32) for name in ("kind", "num_threads")),
    )


@functools.cache
def _kernels() -> ctypes.CDLL:
    """The library, with the types of the functions used here."""
    loaded = library()
    loaded.mixtral_linear_scratch_bytes.argtypes = [*[ctypes.c_int64] * 2, ctypes.c_int32]
    loaded.mixtral_linear_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_experts_scratch_bytes.argtypes = [*[ctypes.c_int64] * 5, ctypes.c_int32]
    loaded.mixtral_experts_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_linear.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32]
    loaded.mixtral_linear.restype = None
    loaded.mixtral_experts.argtypes = [ctypes.c_void_p]
    loaded.mixtral_experts.restype = ctypes.c_int
    return loaded


class _Scratch(threading.local):
    """Memory for what a pass computes on the way, kept between calls."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._address = self._size = 0

    def address(self, num_bytes: int) -> int:
        """Of at least ``num_bytes``, aligned to a cache line, good until this thread's next call."""
        if self._size < num_bytes:
            self._size = 0
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(num_bytes + 63, dtype=torch.uint8)
            self._size, self._address = num_bytes, -(-self._memory.data_ptr() // 64) * 64
        return self._address


scratch: Final = _Scratch()
"""Of the calling thread; shared by all that computes with packed matrices, one call at a time."""


@functools.lru_cache(maxsize=1024)
def linear_scratch_bytes(kind: Kind, num_rows: int, num_cols: int) -> int:
    """Scratch memory a call of ``linear_*`` with so many rows uses, bytes."""
    size: int = _kernels().mixtral_linear_scratch_bytes(min(num_rows, PASS_ROWS), num_cols, KIND_NUMBERS[kind])
    return size


@functools.lru_cache(maxsize=1024)
def experts_scratch_bytes(
    kind: Kind, num_rows: int, hidden_size: int, k: int, num_experts: int, num_inner_tiles: int
) -> int:
    """Scratch memory a call of ``experts_*`` with so many rows uses, bytes; tiles are those of w1 and w3."""
    sizes = (min(num_rows, PASS_ROWS), hidden_size, k, num_experts, num_inner_tiles)
    size: int = _kernels().mixtral_experts_scratch_bytes(*sizes, KIND_NUMBERS[kind])
    return size


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelArgumentError(message)


def _is_dense(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous()


def _not_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: object) -> KernelArgumentError:
    strides = list(tensor.stride()) if tensor.layout is torch.strided else tensor.layout
    return KernelArgumentError(
        f"{name} must be a contiguous {dtype} tensor of shape {shape} on the CPU, "
        f"not {tensor.dtype} {list(tensor.shape)} with strides {strides} on {tensor.device}"
    )


def _check_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or not _is_dense(tensor, dtype):
        raise _not_dense(name, tensor, dtype, list(shape))


def _num_rows_of(name: str, tensor: torch.Tensor, num_cols: int) -> int:
    """Of a dense fp32 tensor [rows, num_cols].

    Raises:
        KernelArgumentError: it is none.
    """
    shape = tensor.shape
    if len(shape) != 2 or shape[1] != num_cols or not _is_dense(tensor, torch.float32):
        raise _not_dense(name, tensor, torch.float32, f"[rows, {num_cols}]")
    rows: int = shape[0]
    return rows


def check_packed(name: str, quants: torch.Tensor, scales: torch.Tensor, *, kind: Kind, dims: tuple[int, ...]) -> None:
    """``dims``: leading dimensions, then rows and columns without padding.

    Raises:
        KernelArgumentError: the tensors are not such a matrix in the packed layout.
    """
    *leading, num_rows, num_cols = dims
    tiles, groups = -(-num_rows // TILE_ROWS), -(-num_cols // GROUP_COLS)
    lines = (groups * GROUP_COLS // 4, 64) if kind == "int8" else (groups, 256)
    per_tile = TILE_ROWS if kind == "int8" else int4_tile_scale_bytes(groups)
    _check_dense(f"{name}quants", quants, torch.uint8, (*leading, tiles, *lines))
    _check_dense(f"{name}scales", scales, _SCALE_DTYPES[kind], (*leading, tiles, per_tile))
    _require(scales.data_ptr() % SCALE_BYTES == 0, f"{name}scales must begin at a multiple of {SCALE_BYTES} bytes")


class NativeLinear:
    """One matrix, checked once: called with rows, it computes what ``linear_*`` does.

    A lone product of a row takes a millisecond, and what the interpreter does in between runs from memory, since the
    weights have just passed through the caches: an operator's way through the dispatcher is a tenth of it.

    Raises:
        KernelArgumentError: the tensors are not a matrix of ``num_rows`` by ``num_cols`` in the packed layout.
    """

    def __init__(self, kind: Kind, quants: torch.Tensor, scales: torch.Tensor, *, num_rows: int, num_cols: int) -> None:
        _require(0 < num_cols <= MAX_COLS, f"x must have 1 to {MAX_COLS} columns, not {num_cols}")
        _require(num_rows > 0, f"num_rows must be positive, not {num_rows}")
        check_packed("", quants, scales, kind=kind, dims=(num_rows, num_cols))
        self._held = quants, scales  # addresses do not keep a tensor alive
        addresses = PackedWeights(quants.data_ptr(), scales.data_ptr())
        self._weights = _LinearWeights(addresses, num_cols, num_rows, KIND_NUMBERS[kind])
        self._address = ctypes.addressof(self._weights)
        self._kind, self._num_rows, self._num_cols = kind, num_rows, num_cols
        self._multiply = _kernels().mixtral_linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, num_cols] to fp32 [rows, num_rows].

        Raises:
            KernelArgumentError: ``x`` is not such a tensor.
        """
        rows = _num_rows_of("x", x, self._num_cols)
        out = torch.empty(rows, self._num_rows)
        memory = scratch.address(linear_scratch_bytes(self._kind, rows, self._num_cols))
        source, target, threads = x.data_ptr(), out.data_ptr(), torch.get_num_threads()
        for first in range(0, rows, PASS_ROWS):
            self._multiply(self._address, source, target, memory, min(PASS_ROWS, rows - first), threads)
            source += PASS_ROWS * self._num_cols * 4
            target += PASS_ROWS * self._num_rows * 4
        return out


class NativeExperts:
    """All experts of a layer, checked once: called with rows, it computes what ``experts_*`` does.

    Args:
        kind: of all matrices.
        tensors: quants and scales of w1, of w2 and of w3, experts first.
        hidden_size: columns of w1 and w3, rows of w2, without padding.

    Raises:
        KernelArgumentError: the tensors are not such matrices in the packed layout.
    """

    def __init__(self, kind: Kind, tensors: Sequence[torch.Tensor], *, hidden_size: int) -> None:
        w1_quants = tensors[0]
        _require(w1_quants.dim() == 4, f"w1_quants must have 4 dimensions, experts first, not {w1_quants.dim()}")
        num_experts, tiles = w1_quants.shape[:2]
        inner = tiles * TILE_ROWS
        _require(0 < hidden_size <= MAX_COLS, f"hidden must have 1 to {MAX_COLS} columns, not {hidden_size}")
        _require(0 < inner <= MAX_COLS, f"w1_quants must hold 1 to {MAX_COLS} rows per expert, not {inner}")
        up, down = (num_experts, inner, hidden_size), (num_experts, hidden_size, inner)
        for at, (name, dims) in enumerate((("w1_", up), ("w2_", down), ("w3_", up))):
            check_packed(name, tensors[2 * at], tensors[2 * at + 1], kind=kind, dims=dims)
        self._held = tuple(tensors)  # addresses do not keep a tensor alive
        addresses = [tensor.data_ptr() for tensor in tensors]
        self._weights = [PackedWeights(*addresses[at : at + 2]) for at in (0, 2, 4)]
        self._kind, self._hidden_size, self._num_experts, self._tiles = kind, hidden_size, num_experts, tiles
        self._compute = _kernels().mixtral_experts

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, hidden], int64 [rows, k] and fp32 [rows, k] to fp32 [rows, hidden].

        Raises:
            KernelArgumentError: arguments that are not such tensors, or an id that names no expert.
        """
        width = self._hidden_size
        rows = _num_rows_of("hidden", hidden, width)
        _require(ids.dim() == 2, f"ids must have the shape [rows, k], not {list(ids.shape)}")
        k = ids.shape[1]
        _require(0 < k <= MAX_CHOSEN, f"ids must name 1 to {MAX_CHOSEN} experts per row, not {k}")
        _check_dense("ids", ids, torch.int64, (rows, k))
        _check_dense("weights", weights, torch.float32, (rows, k))
        out = torch.empty(rows, width)
        sizes = (width, k, self._num_experts, self._tiles)
        memory = scratch.address(experts_scratch_bytes(self._kind, rows, *sizes))
        ends = (KIND_NUMBERS[self._kind], torch.get_num_threads())
        for first in range(0, rows, PASS_ROWS):
            count, wide, narrow = min(PASS_ROWS, rows - first), first * width * 4, first * k * 4
            inputs = (hidden.data_ptr() + wide, ids.data_ptr() + 2 * narrow, weights.data_ptr() + narrow)
            call = _ExpertsCall(*inputs, *self._weights, out.data_ptr() + wide, memory, count, *sizes, *ends)
            status = self._compute(ctypes.byref(call))
            assert status != 2, "k was checked"
            if status != 0:
                raise KernelArgumentError(f"ids must lie in 0..{self._num_experts - 1}")
        return out


def _linear(kind: Kind, x: torch.Tensor, quants: torch.Tensor, scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    _require(x.dim() == 2, f"x must have the shape [rows, num_cols], not {list(x.shape)}")
    return NativeLinear(kind, quants, scales, num_rows=num_rows, num_cols=x.shape[1])(x)


def _experts(
    kind: Kind, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *tensors: torch.Tensor
) -> torch.Tensor:
    _require(hidden.dim() == 2, f"hidden must have the shape [rows, hidden], not {list(hidden.shape)}")
    return NativeExperts(kind, tensors, hidden_size=hidden.shape[1])(hidden, ids, weights)


def _linear_int8(x: torch.Tensor, quants: torch.Tensor, scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    return _linear("int8", x, quants, scales, num_rows)


def _linear_int4(x: torch.Tensor, quants: torch.Tensor, scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    return _linear("int4", x, quants, scales, num_rows)


def _experts_int8(*tensors: torch.Tensor) -> torch.Tensor:
    return _experts("int8", *tensors)


def _experts_int4(*tensors: torch.Tensor) -> torch.Tensor:
    return _experts("int4", *tensors)


def _linear_shape(x: torch.Tensor, _quants: torch.Tensor, _scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], num_rows)


def _experts_shape(hidden: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)


_LINEAR_SCHEMA: Final = "(Tensor x, Tensor quants, Tensor scales, int num_rows) -> Tensor"
_EXPERTS_SCHEMA: Final = (
    "(Tensor hidden, Tensor ids, Tensor weights, Tensor w1_quants, Tensor w1_scales, Tensor w2_quants, "
    "Tensor w2_scales, Tensor w3_quants, Tensor w3_scales) -> Tensor"
)
_library = torch.library.Library("mixtral_serve", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch does not say
for _name, _schema, _run, _shape in (
    ("linear_int8", _LINEAR_SCHEMA, _linear_int8, _linear_shape),
    ("linear_int4", _LINEAR_SCHEMA, _linear_int4, _linear_shape),
    ("experts_int8", _EXPERTS_SCHEMA, _experts_int8, _experts_shape),
    ("experts_int4", _EXPERTS_SCHEMA, _experts_int4, _experts_shape),
):
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]  # PyTorch does not say
    _library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
    torch.library.register_fake(f"mixtral_serve::{_name}", _shape, lib=_library)
