"""Passes over rows as wide as the vocabulary: in the compiled kernels where they are, else in PyTorch's operators.

Owns: that choice, for the whole process. Maxima and finiteness are the same either way; shares may differ in their last
bits, so a token drawn with the one may, once in a great while, not be the one drawn with the other.

Invariant: a row's results do not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

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


def chunk_shares(rows: torch.Tensor, peaks: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, chunks], fp32: up to a factor per row, the sum of exp((x - peak) * scale) over every ``length`` columns.

    Args:
        rows: fp32 [rows, a multiple of ``length``], no NaN.
        peaks: [rows], each row's largest number.
        scales: [rows].
    """
    if _IS_NATIVE:
        shares: torch.Tensor = _ops.chunk_shares.default(rows, peaks, scales, length)
        return shares
    # Of PyTorch's exponentials only that of softmax treats a row alike wherever it stands.
    exponents = (rows - peaks.unsqueeze(1)).mul_(scales.unsqueeze(1))
    return functional.softmax(exponents, dim=-1).view(rows.shape[0], -1, length).sum(dim=-1)


def near_totals(rows: torch.Tensor, peaks: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
    """[rows], fp64: the sum of exp((x - peak) * scale) over all columns, off by 1e-5 of it at most."""
    if _IS_NATIVE:
        return chunk_shares(rows, peaks, scales, length).double().sum(dim=-1)
    exponents = (rows - peaks.unsqueeze(1)).mul_(scales.unsqueeze(1))
    return functional.softmax(exponents, dim=-1).amax(dim=-1).double().reciprocal_()  # the largest weighs 1
