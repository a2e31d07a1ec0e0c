"""Passes over rows as wide as the vocabulary, in the compiled kernels: what sampling asks of logits.

    mixtral_serve::chunk_maxima   the largest number of every chunk of a row
    mixtral_serve::finite_rows    whether all numbers of a row are finite

Invariant: a row's results have the same bits in any batch, for any number of threads and on any instruction set
(``csrc/vocabulary.h``).

Rejected: PyTorch's operators, a chain of which passes over 64 rows of 32,000 logits a dozen times to draw a token.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from mixtral_serve.kernels.native import library


class _ChunkCall(ctypes.Structure):
    """``ChunkCall`` of ``csrc/vocabulary.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "out")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "length")),
        *((name, ctypes.c_void_p) for name in ("peaks", "scales")),
    )


@functools.cache
def _typed_library() -> ctypes.CDLL:
    loaded = library()
    loaded.mixtral_chunk_maxima.argtypes = [ctypes.POINTER(_ChunkCall), ctypes.c_int64]
    loaded.mixtral_chunk_maxima.restype = None
    loaded.mixtral_finite_rows.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3
    loaded.mixtral_finite_rows.restype = None
    return loaded


_LIBRARY = torch.library.Library("mixtral_serve", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define("chunk_maxima(Tensor rows, int length) -> Tensor")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define("finite_rows(Tensor rows) -> Tensor")  # type: ignore[no-untyped-call]  # PyTorch does not say


def _chunk_maxima(rows: torch.Tensor, length: int) -> torch.Tensor:
    """fp32 [rows, width] without NaN -> [rows, chunks]; the last chunk may be short."""
    _check_rows(rows)
    _require(length > 0, "chunks have a positive length")
    num_rows, width = rows.shape
    out = torch.empty(num_rows, -(-width // length))
    call = _ChunkCall(rows.data_ptr(), out.data_ptr(), num_rows, width, length)
    _typed_library().mixtral_chunk_maxima(ctypes.byref(call), torch.get_num_threads())
    return out


def _finite_rows(rows: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, width] -> bool [rows]."""
    _check_rows(rows)
    out = torch.empty(rows.shape[0], dtype=torch.bool)
    _typed_library().mixtral_finite_rows(rows.data_ptr(), out.data_ptr(), *rows.shape, torch.get_num_threads())
    return out


def _check_rows(rows: torch.Tensor) -> None:
    is_matrix = rows.dtype is torch.float32 and rows.dim() == 2 and rows.is_contiguous()
    _require(is_matrix and rows.shape[1] > 0, "rows must be dense fp32 [rows, width]")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _chunks_fake(rows: torch.Tensor, length: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], -(-rows.shape[1] // length))


def _finite_fake(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.bool)


for _name, _run, _fake in (
    ("chunk_maxima", _chunk_maxima, _chunks_fake),
    ("finite_rows", _finite_rows, _finite_fake),
):
    _LIBRARY.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
    torch.library.register_fake(f"mixtral_serve::{_name}", _fake, lib=_LIBRARY)
