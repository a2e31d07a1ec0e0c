"""``Routing``: rows sorted by expert, and the way back.

Owns the bookkeeping around a sparse layer that every implementation in PyTorch needs: rows are sorted by expert once,
so that the rows of one expert are contiguous, and the results go back to their tokens by a permutation.

Invariants: no capacity limit and no dropped row; the results of a token's experts are added in ascending expert id, so
that the order of the sum is a function of the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch


class Span(NamedTuple):
    """The sorted rows ``first..end-1`` go to ``expert``."""

    expert: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Routing:
    """One step's rows, by expert."""

    spans: tuple[Span, ...]
    """Touched experts, ascending; together they cover all sorted rows."""
    _order: torch.Tensor
    _weights: torch.Tensor
    """[rows, k] in ascending expert id."""

    @classmethod
    def of(cls, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> Self:
        """Sort by expert: ``top_k_index`` [rows, k] ids below ``num_experts``, and their weights [rows, k]."""
        ascending, rank = top_k_index.sort(dim=-1)
        by_expert, order = ascending.reshape(-1).sort(stable=True)
        spans = []
        first = 0
        for expert, count in enumerate(torch.bincount(by_expert, minlength=num_experts).tolist()):
            if count:
                spans.append(Span(expert, first, first + count))
                first += count
        return cls(tuple(spans), order, top_k_weights.gather(1, rank))

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> [rows * k, width], by expert."""
        return rows.index_select(0, self._order // self._weights.shape[1])

    def combine(self, results: torch.Tensor) -> torch.Tensor:
        """Sorted results [rows * k, width] -> their weighted sums [rows, width]."""
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(self._order.shape[0])
        num_rows, k = self._weights.shape
        weighted = results.index_select(0, back).view(num_rows, k, -1) * self._weights.unsqueeze(-1)
        total = weighted[:, 0]
        for i in range(1, k):
            total = total + weighted[:, i]
        return total
