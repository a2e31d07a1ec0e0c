"""The next token of each row of logits, in the compiled kernels.

    mixtral_serve::choose_tokens   greedy, drawn from all, or drawn from what filters leave

Owns: the operator, and the table ``asked`` that it reads. ``model/sampler.py`` says what the parameters mean.

Invariants: a row's token is a function of that row alone, for any number of threads; whatever the numbers are, nothing
outside the tensors is read, and a token lies within the row.

Rejected: PyTorch's operators, thirty of which touch 64 rows of logits, or what is left of them, to draw a token.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

import torch

from mixtral_serve.kernels.native import library

NOT_FINITE: Final = -2
NUM_ASKED: Final = 5
"""Columns of ``asked``: temperature (0: the most likely), top_k (0: all), top_p, min_p, and the draw in [0, 1)."""


class _ChoiceCall(ctypes.Structure):
    """``ChoiceCall`` of ``csrc/choice.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "asked", "tokens", "scratch")),
        *((name, ctypes.c_int64) for name in ("num_rows", "width", "is_raw")),
    )


@functools.cache
def _kernels() -> ctypes.CDLL:
    """The library, with the types of the functions used here."""
    loaded = library()
    loaded.mixtral_choice_scratch_bytes.argtypes = [ctypes.c_int64]
    loaded.mixtral_choice_scratch_bytes.restype = ctypes.c_int64
    loaded.mixtral_choose.argtypes = [ctypes.POINTER(_ChoiceCall), ctypes.c_int64]
    loaded.mixtral_choose.restype = None
    return loaded


def _choose_tokens(logits: torch.Tensor, asked: torch.Tensor, is_raw: bool) -> torch.Tensor:
    """fp32 [rows, width] and fp64 [rows, 5] -> int64 [rows]; see ``csrc/choice.cpp``."""
    is_matrix = logits.dtype is torch.float32 and logits.dim() == 2 and logits.is_contiguous()
    _require(is_matrix and 0 < logits.shape[1] < 1 << 31, "logits must be dense fp32 [rows, width]")
    num_rows, width = logits.shape
    fits = asked.dtype is torch.float64 and asked.shape == (num_rows, NUM_ASKED) and asked.is_contiguous()
    _require(fits, f"asked must be dense fp64 [{num_rows}, {NUM_ASKED}]")
    tokens, threads = torch.empty(num_rows, dtype=torch.int64), torch.get_num_threads()
    scratch = torch.empty(threads * _kernels().mixtral_choice_scratch_bytes(width), dtype=torch.uint8)
    addresses = (tensor.data_ptr() for tensor in (logits, asked, tokens, scratch))
    _kernels().mixtral_choose(ctypes.byref(_ChoiceCall(*addresses, num_rows, width, is_raw)), threads)
    return tokens


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _choice_fake(logits: torch.Tensor, _asked: torch.Tensor, _is_raw: bool) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_LIBRARY = torch.library.Library("mixtral_serve", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.define("choose_tokens(Tensor logits, Tensor asked, bool is_raw) -> Tensor")  # type: ignore[no-untyped-call]  # PyTorch does not say
_LIBRARY.impl("choose_tokens", _choose_tokens, "CPU")  # type: ignore[no-untyped-call]  # PyTorch does not say
torch.library.register_fake("mixtral_serve::choose_tokens", _choice_fake, lib=_LIBRARY)
