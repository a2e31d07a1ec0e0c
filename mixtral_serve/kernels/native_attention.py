"""Attention over paged keys and values in the compiled kernels: ``torch.ops.mixtral_serve.paged_attention``.

One call does one layer of one step: it stores the step's keys and values (as fp32, bf16 or int8 with one scale per
token and head) and attends from every row to what the row may see, decodes and prefill slices alike. The order of
all sums is a function of the row alone (``csrc/attention.h``), so a row has the same bits alone, in any batch, under
any chunking and for any number of threads.

The step is told in integers: ``pieces`` [n, 7] are query rows that share keys, ``merges`` [n, 3] are decodes whose
splits are computed apart, ``tables`` are block ids that pieces point into. Whatever they say, nothing outside the
given tensors is read or written: they are checked, and a bad one raises ``ValueError``.

Rejected: one call per request (64 calls per layer); torch.library.custom_op (checks the schema anew in each call, at
several times the price of a registered function).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from mixtral_serve.kernels.native import library

PIECE_FIELDS: Final = 7
"""First row of the slice, its position, table offset, first row of the piece, rows, split or -1, partial slot or -1."""
MERGE_FIELDS: Final = 3
"""Row, first partial slot, number of slots."""
MAX_PIECE_ROWS: Final = 64
SPLIT_KEYS: Final = 512
"""Contexts are split at multiples of so many positions, whoever computes the splits."""

_STORAGE: Final[dict[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ERRORS: Final = ("", "a slot is outside the storage", "a block is outside the storage", "a piece", "a merge")


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of ``csrc/attention.h``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((f"{name}_{of}_stride", ctypes.c_int64) for name in ("query", "key", "value") for of in ("row", "head")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_query_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_int64) for name in ("storage", "num_blocks", "block_size")),
        *((name, ctypes.c_void_p) for name in ("slots", "tables")),
        ("num_table_entries", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("num_pieces", ctypes.c_int64),
        ("merges", ctypes.c_void_p),
        ("num_merges", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("workspace", "partials")),
        *((name, ctypes.c_int64) for name in ("num_partials", "num_threads")),
    )


class LayerStorage(ctypes.Structure):
    """``LayerStorage`` of ``csrc/layers.cpp``: addresses of one layer's keys and values."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


@dataclass(frozen=True, slots=True)
class _Functions:
    """The library's functions, typed."""

    attend: ctypes._NamedFuncPointer
    workspace_floats: ctypes._NamedFuncPointer
    partial_floats: ctypes._NamedFuncPointer


@functools.cache
def _functions() -> _Functions:
    loaded = library()
    attend = loaded.mixtral_paged_attention
    attend.argtypes, attend.restype = [ctypes.POINTER(AttentionCall)], ctypes.c_int
    sizes = (loaded.mixtral_attention_workspace_floats, loaded.mixtral_attention_partial_floats)
    for size in sizes:
        size.argtypes, size.restype = [ctypes.c_int64], ctypes.c_int64
    return _Functions(attend, *sizes)


def workspace_floats(head_dim: int) -> int:
    """What one thread works in, in floats.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    return int(_functions().workspace_floats(head_dim))


def partial_floats(head_dim: int, num_query_heads: int) -> int:
    """What one split of one decode leaves behind, in floats.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    return int(_functions().partial_floats(head_dim)) * num_query_heads


_LIBRARY = torch.library.Library("mixtral_serve", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define(  # type: ignore[no-untyped-call]  # PyTorch does not say
    "paged_attention(Tensor[] rows, Tensor(a!)[] storage, Tensor[] step, Tensor(b!)[] workspace, int window,"
    " float scaling) -> Tensor"
)


def _paged_attention(
    rows: Sequence[torch.Tensor],
    storage: Sequence[torch.Tensor],
    step: Sequence[torch.Tensor],
    workspace: Sequence[torch.Tensor],
    window: int,
    scaling: float,
) -> torch.Tensor:
    """Store keys and values, attend.

    Args:
        rows: queries [rows, query_heads, head_dim], keys and values [rows, kv_heads, head_dim], fp32; strides are free
            but for head_dim, which is dense.
        storage: one layer's keys [blocks, kv_heads, head_dim, block_size] and values [blocks, kv_heads, block_size,
            head_dim]; for int8 followed by the scales of both, fp32 [blocks, kv_heads, block_size].
        step: slots [rows], tables [n], pieces [n, 7], merges [n, 3], int64.
        workspace: fp32 [threads * workspace_floats] and [slots * partial_floats].
        window: positions a row sees, itself included; 0 for all.
        scaling: factor of the scores.

    Returns:
        fp32 [rows, query_heads, head_dim]; rows that no piece names are left as they were allocated.
    """
    query, key, value = rows
    _check_rows(query, key, value)
    num_rows, num_query_heads = query.shape[:2]
    _require(storage[0].shape[1:3] == key.shape[1:], "the storage is for other heads than the rows have")
    call = attention_call(
        storage, step, workspace, num_rows=num_rows, num_query_heads=num_query_heads, window=window, scaling=scaling
    )
    out = torch.empty(query.shape, dtype=torch.float32)
    call.query, call.key, call.value, call.out = (tensor.data_ptr() for tensor in (query, key, value, out))
    call.query_row_stride, call.query_head_stride = query.stride()[:2]
    call.key_row_stride, call.key_head_stride = key.stride()[:2]
    call.value_row_stride, call.value_head_stride = value.stride()[:2]
    raise_for(_functions().attend(ctypes.byref(call)))
    return out


def attention_call(
    storage: Sequence[torch.Tensor],
    step: Sequence[torch.Tensor],
    workspace: Sequence[torch.Tensor],
    *,
    num_rows: int,
    num_query_heads: int,
    window: int,
    scaling: float,
) -> AttentionCall:
    """All of a call but its rows, checked; the arguments must outlive it. See ``torch.ops.mixtral_serve``.

    Raises:
        ValueError: an argument that does not fit the others.
    """
    keys, values, *scales = storage
    slots, tables, pieces, merges = step
    _check_storage(keys, values, scales)
    _check_step(slots, tables, pieces, merges, num_rows=num_rows)
    _require(window >= 0, "window must not be negative")
    functions = _functions()
    _, num_kv_heads, head_dim, block_size = keys.shape
    _require(num_query_heads % num_kv_heads == 0, "query heads must be a multiple of key heads")
    partials = functions.partial_floats(head_dim) * num_query_heads
    threads = _num_slots(workspace[0], functions.workspace_floats(head_dim))
    _require(threads > 0, "the workspace is too small for one thread")
    return AttentionCall(
        **_addresses(storage),
        num_rows=num_rows,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        storage=_STORAGE[keys.dtype],
        num_blocks=keys.shape[0],
        block_size=block_size,
        slots=slots.data_ptr(),
        tables=tables.data_ptr(),
        num_table_entries=tables.shape[0],
        pieces=pieces.data_ptr(),
        num_pieces=pieces.shape[0],
        merges=merges.data_ptr(),
        num_merges=merges.shape[0],
        window=window,
        scaling=scaling,
        workspace=workspace[0].data_ptr(),
        partials=workspace[1].data_ptr(),
        num_partials=_num_slots(workspace[1], partials),
        num_threads=min(threads, torch.get_num_threads()),
    )


def layer_storage(layers: Sequence[Sequence[torch.Tensor]]) -> ctypes.Array[LayerStorage]:
    """The addresses of each layer's ``storage``, all of one form; the tensors must outlive them."""
    return (LayerStorage * len(layers))(*(LayerStorage(**_addresses(storage)) for storage in layers))


def _addresses(storage: Sequence[torch.Tensor]) -> dict[str, int]:
    names = ("keys", "values", "key_scales", "value_scales")
    return {name: tensor.data_ptr() for name, tensor in zip(names, storage, strict=False)}


def raise_for(error: int) -> None:
    """Raises ``ValueError`` for what the library says of a call, unless it is 0."""
    _require(error == 0, f"{_ERRORS[error]} does not fit the step")


def _paged_attention_fake(
    rows: Sequence[torch.Tensor],
    storage: Sequence[torch.Tensor],  # noqa: ARG001 - the schema's arguments
    step: Sequence[torch.Tensor],  # noqa: ARG001 - the schema's arguments
    workspace: Sequence[torch.Tensor],  # noqa: ARG001 - the schema's arguments
    window: int,  # noqa: ARG001 - the schema's arguments
    scaling: float,  # noqa: ARG001 - the schema's arguments
) -> torch.Tensor:
    return rows[0].new_empty(rows[0].shape)


_LIBRARY.impl("paged_attention", _paged_attention, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
torch.library.register_fake("mixtral_serve::paged_attention", _paged_attention_fake, lib=_LIBRARY)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"paged_attention: {message}")


def _num_slots(tensor: torch.Tensor, floats: int) -> int:
    _require(tensor.dtype is torch.float32 and tensor.is_contiguous(), "the workspace must be dense fp32")
    return tensor.numel() // floats


def _check_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for tensor in (query, key, value):
        _require(tensor.dtype is torch.float32 and tensor.dim() == 3, "rows must be fp32 of three dimensions")
        _require(tensor.stride(2) == 1, "rows must be dense along head_dim")
        _require(tensor.shape[0] == query.shape[0] and tensor.shape[2] == query.shape[2], "rows differ in shape")
    _require(key.shape == value.shape, "keys and values differ in shape")
    _require(query.shape[2] > 0 and key.shape[1] > 0, "rows are empty")
    _require(query.shape[1] % key.shape[1] == 0, "query heads must be a multiple of key heads")


def _check_storage(keys: torch.Tensor, values: torch.Tensor, scales: Sequence[torch.Tensor]) -> None:
    _require(keys.dtype in _STORAGE and keys.dtype is values.dtype, "storage must be fp32, bf16 or int8")
    _require(keys.dim() == 4 and min(keys.shape) > 0, "keys must have four dimensions")
    num_blocks, num_kv_heads, head_dim, block_size = keys.shape
    _require(values.shape == (num_blocks, num_kv_heads, block_size, head_dim), "values have another shape")
    _require(len(scales) == (2 if keys.dtype is torch.int8 else 0), "scales go with int8, and only with it")
    for scale in scales:
        fits = scale.dtype is torch.float32 and scale.shape == (num_blocks, num_kv_heads, block_size)
        _require(fits, "scales must be fp32 [blocks, kv_heads, block_size]")
    _require(all(tensor.is_contiguous() for tensor in (keys, values, *scales)), "the storage must be dense")


def _check_step(
    slots: torch.Tensor, tables: torch.Tensor, pieces: torch.Tensor, merges: torch.Tensor, *, num_rows: int
) -> None:
    for tensor in (slots, tables, pieces, merges):
        _require(tensor.dtype is torch.int64 and tensor.is_contiguous(), "the step must be dense int64")
    _require(slots.shape == (num_rows,), "there must be one slot per row")
    _require(tables.dim() == 1, "tables must have one dimension")
    _require(pieces.dim() == 2 and pieces.shape[1] == PIECE_FIELDS, "pieces must be [n, 7]")
    _require(merges.dim() == 2 and merges.shape[1] == MERGE_FIELDS, "merges must be [n, 3]")
