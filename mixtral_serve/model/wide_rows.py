"""Passes over rows as wide as the vocabulary: in the compiled kernels where they are, else in PyTorch's operators.

Owns: that choice, for the whole process.

Invariant: what comes back is the same either way, bit for bit.
"""

from __future__ import annotations

from typing import Final

import torch

import mixtral_serve.kernels.native_vocabulary  # noqa: F401 - registers the operators
from mixtral_serve.kernels import native

_IS_NATIVE: Final = native.is_available()
_ops: Final = torch.ops.mixtral_serve


def finite_rows(rows: torch.Tensor) -> list[bool]:
    """Which rows of ``rows`` [rows, width] hold finite numbers only."""
    if _IS_NATIVE:
        finite: list[bool] = _ops.finite_rows.default(rows.contiguous()).tolist()
        return finite
    # A sum is finite only if its terms are, and takes a fifth of the time; the rare sum that is not is looked into.
    sums: list[bool] = torch.isfinite(rows.sum(dim=-1)).tolist()
    return [ok or bool(torch.isfinite(rows[i]).all()) for i, ok in enumerate(sums)]


def chunk_maxima(rows: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, chunks]: the largest number of every ``length`` columns of ``rows`` [rows, a multiple of it]; no NaN."""
    if _IS_NATIVE:
        maxima: torch.Tensor = _ops.chunk_maxima.default(rows, length)
        return maxima
    return rows.view(rows.shape[0], -1, length).amax(dim=-1)
