"""Products of fp32 rows with quantised weights on the compiled kernels, as PyTorch operators.

    mixtral_serve::linear_int8, linear_int4      rows times one matrix
    mixtral_serve::experts_int8, experts_int4    Mixtral's experts: w2(silu(w1 x) * (w3 x)), weighted and added

Invariants: arguments are checked here before their addresses are passed on, so that no tensor can make the kernels
read or write outside it; a row's result has the same bits alone, in any batch and for any number of threads, on every
instruction set. Rows are worked on in passes of at most ``PASS_ROWS``, which bounds the scratch memory; it is kept per
thread, as large as the largest pass so far.

Rejected: scratch memory allocated per call (the kernel would zero fresh pages for longer than a decode step computes);
``torch.library.custom_op`` (14 microseconds for a call that takes 12 when registered directly, 9 of them in here).
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Final

import torch

from mixtral_serve.kernels.formats import GROUP_COLS, TILE_ROWS, Kind
from mixtral_serve.kernels.native import library

PASS_ROWS: Final = 512
"""Rows worked on at a time; more are worked on in several passes."""
MAX_COLS: Final = 131072
"""Columns of a matrix: more could exceed the kernels' 32-bit sums."""
MAX_CHOSEN: Final = 64
"""Experts per row."""

KIND_NUMBERS: Final[dict[Kind, int]] = {"int8": 0, "int4": 1}
_SCALE_DTYPES: Final[dict[Kind, torch.dtype]] = {"int8": torch.float32, "int4": torch.bfloat16}


class KernelArgumentError(ValueError):
    """A tensor that an operator cannot work on; the message names the argument and what it must be."""


class PackedWeights(ctypes.Structure):
    """``PackedWeights`` of operations.h."""

    _fields_ = (("quants", ctypes.c_void_p), ("scales", ctypes.c_void_p))


class _LinearCall(ctypes.Structure):
    """``LinearCall`` of operations.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weights", PackedWeights),
        *((name, ctypes.c_void_p) for name in ("out", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_cols", "num_groups", "num_outputs")),
        *((name, ctypes.c_int32) for name in ("kind", "num_threads")),
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
    loaded.mixtral_linear_scratch_bytes.argtypes = [ctypes.c_int64] * 2
    loaded.mixtral_linear_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_experts_scratch_bytes.argtypes = [ctypes.c_int64] * 5
    loaded.mixtral_experts_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_linear.argtypes = [ctypes.c_void_p]
    loaded.mixtral_linear.restype = None
    loaded.mixtral_experts.argtypes = [ctypes.c_void_p]
    loaded.mixtral_experts.restype = ctypes.c_int
    return loaded


class _Scratch(threading.local):
    """Memory for what a pass computes on the way, kept between calls."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Of at least ``num_bytes``, aligned to a cache line, good until this thread's next call."""
        if self._memory.numel() < num_bytes + 63:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._memory = torch.empty(num_bytes + 63, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // 64) * 64


scratch: Final = _Scratch()
"""Of the calling thread; shared by all that computes with packed matrices, one call at a time."""


def linear_scratch_bytes(num_rows: int, num_cols: int) -> int:
    """Scratch memory a call of ``linear_*`` with so many rows uses, bytes."""
    size: int = _kernels().mixtral_linear_scratch_bytes(min(num_rows, PASS_ROWS), -(-num_cols // GROUP_COLS))
    return size


def experts_scratch_bytes(num_rows: int, hidden_size: int, intermediate_size: int, *, num_experts: int, k: int) -> int:
    """Scratch memory a call of ``experts_*`` with so many rows uses, bytes."""
    tiles = -(-intermediate_size // TILE_ROWS)
    size: int = _kernels().mixtral_experts_scratch_bytes(min(num_rows, PASS_ROWS), hidden_size, k, num_experts, tiles)
    return size


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelArgumentError(message)


def _check_dense(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
    ):
        raise KernelArgumentError(
            f"{name} must be a contiguous {dtype} tensor of shape {list(shape)} on the CPU, "
            f"not {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )


def check_packed(name: str, quants: torch.Tensor, scales: torch.Tensor, *, kind: Kind, dims: tuple[int, ...]) -> None:
    """``dims``: leading dimensions, then rows and columns without padding.

    Raises:
        KernelArgumentError: the tensors are not such a matrix in the packed layout.
    """
    *leading, num_rows, num_cols = dims
    tiles, groups = -(-num_rows // TILE_ROWS), -(-num_cols // GROUP_COLS)
    lines = (groups * GROUP_COLS // 4, 64) if kind == "int8" else (groups, 256)
    per_tile = (TILE_ROWS,) if kind == "int8" else (groups, TILE_ROWS)
    _check_dense(f"{name}quants", quants, torch.uint8, (*leading, tiles, *lines))
    _check_dense(f"{name}scales", scales, _SCALE_DTYPES[kind], (*leading, tiles, *per_tile))


def _linear(kind: Kind, x: torch.Tensor, quants: torch.Tensor, scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    _require(x.dim() == 2, f"x must have the shape [rows, num_cols], not {list(x.shape)}")
    rows, num_cols = x.shape
    _require(0 < num_cols <= MAX_COLS, f"x must have 1 to {MAX_COLS} columns, not {num_cols}")
    _require(num_rows > 0, f"num_rows must be positive, not {num_rows}")
    _check_dense("x", x, torch.float32, (rows, num_cols))
    check_packed("", quants, scales, kind=kind, dims=(num_rows, num_cols))
    out = torch.empty(rows, num_rows)
    loaded, groups = _kernels(), -(-num_cols // GROUP_COLS)
    threads, number = torch.get_num_threads(), KIND_NUMBERS[kind]
    pass_rows = min(rows, PASS_ROWS)
    memory = scratch.address(loaded.mixtral_linear_scratch_bytes(pass_rows, groups))
    weight = PackedWeights(quants.data_ptr(), scales.data_ptr())
    for first in range(0, rows, PASS_ROWS):
        count = min(PASS_ROWS, rows - first)
        source, target = x.data_ptr() + first * num_cols * 4, out.data_ptr() + first * num_rows * 4
        call = _LinearCall(source, weight, target, memory, count, num_cols, groups, num_rows, number, threads)
        loaded.mixtral_linear(ctypes.byref(call))
    return out


def _check_experts(kind: Kind, tensors: tuple[torch.Tensor, ...]) -> None:
    hidden, ids, weights, w1_quants, w1_scales, w2_quants, w2_scales, w3_quants, w3_scales = tensors
    _require(hidden.dim() == 2, f"hidden must have the shape [rows, hidden], not {list(hidden.shape)}")
    _require(ids.dim() == 2, f"ids must have the shape [rows, k], not {list(ids.shape)}")
    _require(w1_quants.dim() == 4, f"w1_quants must have 4 dimensions, experts first, not {w1_quants.dim()}")
    (rows, width), k = hidden.shape, ids.shape[1]
    num_experts, inner = w1_quants.shape[0], w1_quants.shape[1] * TILE_ROWS
    _require(0 < width <= MAX_COLS, f"hidden must have 1 to {MAX_COLS} columns, not {width}")
    _require(0 < inner <= MAX_COLS, f"w1_quants must hold 1 to {MAX_COLS} rows per expert, not {inner}")
    _require(0 < k <= MAX_CHOSEN, f"ids must name 1 to {MAX_CHOSEN} experts per row, not {k}")
    _check_dense("hidden", hidden, torch.float32, (rows, width))
    _check_dense("ids", ids, torch.int64, (rows, k))
    _check_dense("weights", weights, torch.float32, (rows, k))
    check_packed("w1_", w1_quants, w1_scales, kind=kind, dims=(num_experts, inner, width))
    check_packed("w2_", w2_quants, w2_scales, kind=kind, dims=(num_experts, width, inner))
    check_packed("w3_", w3_quants, w3_scales, kind=kind, dims=(num_experts, inner, width))


def _experts(kind: Kind, *tensors: torch.Tensor) -> torch.Tensor:
    _check_experts(kind, tensors)
    hidden, ids, weights, *matrices = tensors
    (rows, width), k = hidden.shape, ids.shape[1]
    num_experts, tiles = matrices[0].shape[:2]
    out = torch.empty(rows, width)
    loaded = _kernels()
    sizes = (width, k, num_experts, tiles)
    memory = scratch.address(loaded.mixtral_experts_scratch_bytes(min(rows, PASS_ROWS), *sizes))
    addresses = [matrix.data_ptr() for matrix in matrices]
    weights_of = [PackedWeights(*addresses[at : at + 2]) for at in (0, 2, 4)]
    ends = (KIND_NUMBERS[kind], torch.get_num_threads())
    for first in range(0, rows, PASS_ROWS):
        count, wide, narrow = min(PASS_ROWS, rows - first), first * width * 4, first * k * 4
        inputs = (hidden.data_ptr() + wide, ids.data_ptr() + 2 * narrow, weights.data_ptr() + narrow)
        call = _ExpertsCall(*inputs, *weights_of, out.data_ptr() + wide, memory, count, *sizes, *ends)
        status = loaded.mixtral_experts(ctypes.byref(call))
        assert status != 2, "k was checked"
        if status != 0:
            raise KernelArgumentError(f"ids must lie in 0..{num_experts - 1}")
    return out


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
