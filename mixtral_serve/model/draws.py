"""Drawing tokens with PyTorch's operators: for machines without compiled kernels, and for what those hand back.

Owns: ``draw``, and ``draw_exactly``, which puts the whole vocabulary in order and so settles every row. What the
filters mean says ``sampler``.

Invariant: a row's token is a function of that row alone.

Rejected: sorting the whole vocabulary for each row (the filters need the order of the likely few only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch.nn import functional

from mixtral_serve.model.likeliest import chunked, top
from mixtral_serve.model.wide_rows import chunk_maxima

_NUM_CANDIDATES: Final = 64
"""Most likely tokens that are looked at first; rows that keep more are sorted in full."""
_DRAW_CHUNK: Final = 256
"""Tokens whose shares are added up before it is decided among which of them to draw."""
_TOTAL_ERROR: Final = 2e-5
"""Twice what a total in fp32 may be off; a nucleus that this could change is cut by the exact one."""
_LEAST_TEMPERATURE: Final = 1e-30
"""A smaller one is not distinguishable from it, and would be 0 in fp32."""


class Asked(NamedTuple):
    """How a row's token is chosen, in the order of ``native_choice.NUM_ASKED``'s columns."""

    temperature: float
    """0: the most likely token."""
    top_k: int
    """0: all."""
    top_p: float
    min_p: float
    draw: float
    """The random number, in [0, 1)."""


def draw(logits: torch.Tensor, asked: Sequence[Asked]) -> list[int]:
    """A token per row, by inverting the cumulative distribution over ascending ids.

    Args:
        logits: fp32 [rows, vocab], minus infinity allowed.
        asked: of each row; the temperature is not 0.
    """
    tokens = dict.fromkeys(range(len(asked)), 0)
    for draw_all, wanted in ((_draw_plain, False), (_draw_filtered, True)):
        rows = [i for i, params in enumerate(asked) if _filters(params) is wanted]
        if rows:
            params = [asked[i] for i in rows]
            tokens.update(zip(rows, draw_all(logits[rows], params, _draws(params)).tolist(), strict=True))
    return list(tokens.values())


def draw_exactly(logits: torch.Tensor, asked: Sequence[Asked]) -> list[int]:
    """As ``draw``, with the whole vocabulary in order, and equals taken by ascending id."""
    tokens: list[int] = _draw_in_order(logits, asked, _draws(asked)).tolist()
    return tokens


def _draws(asked: Sequence[Asked]) -> torch.Tensor:
    """The random numbers, fp64 [rows, 1]."""
    return torch.tensor([params.draw for params in asked], dtype=torch.float64).unsqueeze(1)


def _filters(params: Asked) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _weights(logits: torch.Tensor, params: Sequence[Asked]) -> torch.Tensor:
    """Probabilities up to a factor, the largest of each row 1: a tiny temperature cannot overflow."""
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64).unsqueeze(1)
    exact = logits.double()
    return (exact - exact.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()


def _scales(params: Sequence[Asked]) -> torch.Tensor:
    """[rows], fp32: what logits are multiplied by."""
    return torch.tensor([1 / max(p.temperature, _LEAST_TEMPERATURE) for p in params])


def _draw_plain(logits: torch.Tensor, params: Sequence[Asked], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: tokens drawn from the whole vocabulary: first a chunk of it by its share, then a token of the chunk."""
    padded = chunked(logits, _DRAW_CHUNK)
    peaks = chunk_maxima(padded, _DRAW_CHUNK).amax(dim=-1)
    scales = _scales(params)
    shares = _shares(padded, peaks, scales).view(len(params), -1, _DRAW_CHUNK).sum(dim=-1).double()
    chunk = _invert(shares, draws)
    rows = torch.arange(len(params))
    reached = shares.cumsum(dim=-1)
    inside = draws.squeeze(1) * reached[:, -1] - (reached[rows, chunk] - shares[rows, chunk])
    # In units of the chunk's own sum from here on.
    within = padded.view(len(params), -1, _DRAW_CHUNK)[rows, chunk]
    weights = _shares(within, peaks, scales).double()
    share = (inside / shares[rows, chunk]).clamp_(0, 1).unsqueeze(1)
    return chunk * _DRAW_CHUNK + _invert(weights, share)


def _shares(rows: torch.Tensor, peaks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, width]: softmax of (row - peak) * scale, with the row's largest number and its scale.

    Of PyTorch's exponentials only that of softmax treats a row alike wherever it stands.
    """
    return functional.softmax((rows - peaks.unsqueeze(1)).mul_(scales.unsqueeze(1)), dim=-1)


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """[rows]: the first column whose cumulative weight exceeds that share of the row's total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, draws * total, right=True)
    # Rounding may lift the target to the total; the last column with a weight is meant then.
    return torch.minimum(found, torch.searchsorted(cumulative, total)).squeeze(1)


@dataclass(frozen=True, slots=True)
class _Filters:
    """The filters of some rows as columns [rows, 1]; ``top_k`` is the vocabulary where it is off."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[Asked], vocab: int) -> _Filters:
        return cls(
            torch.tensor([min(p.top_k, vocab) or vocab for p in params]).unsqueeze(1),
            torch.tensor([p.top_p for p in params], dtype=torch.float64).unsqueeze(1),
            torch.tensor([p.min_p for p in params], dtype=torch.float64).unsqueeze(1),
        )

    def num_kept(self, ranked: torch.Tensor, total: torch.Tensor, vocab: int) -> torch.Tensor:
        """How many of the most likely tokens stay, given the largest weights in descending order and the sum of all.

        The width of ``ranked`` or more means "at least the width".
        """
        width = ranked.shape[1]
        cumulative = ranked.cumsum(dim=-1)
        left = torch.where(self.top_k < vocab, cumulative.gather(1, self.top_k.clamp(max=width) - 1), total)
        nucleus = (cumulative < self.top_p * left).sum(dim=-1, keepdim=True) + 1
        likely = (ranked >= self.min_p).sum(dim=-1, keepdim=True)
        kept = torch.minimum(self.top_k, torch.where(self.top_p < 1, nucleus, vocab))
        return torch.minimum(kept, likely).clamp(max=vocab)


def _draw_filtered(logits: torch.Tensor, params: Sequence[Asked], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: tokens drawn from what the filters leave, by looking at the most likely few where that settles it."""
    vocab = logits.shape[1]
    filters = _Filters.of(params, vocab)
    width = min(vocab, max(_NUM_CANDIDATES, *(p.top_k + 1 for p in params)))
    values, columns = top(logits, width)
    weights = _weights(values, params)
    num_kept = _num_kept(filters, logits, params, weights)
    # Settled: the cut lies within the candidates, and not between equals (whose order here is arbitrary).
    at_cut = values.gather(1, num_kept.clamp(max=width - 1))
    before_cut = values.gather(1, num_kept.clamp(max=width) - 1)
    settled = (num_kept == vocab) if width == vocab else torch.zeros_like(num_kept, dtype=torch.bool)
    settled |= (num_kept < width) & (at_cut < before_cut)
    ids, by_id = columns.sort(dim=-1)
    kept = weights.masked_fill_(torch.arange(width) >= num_kept, 0).gather(1, by_id)
    tokens = ids.gather(1, _invert(kept, draws).unsqueeze(1)).squeeze(1)
    rest = (~settled).squeeze(1).nonzero().flatten().tolist()
    if rest:
        tokens[rest] = _draw_in_order(logits[rest], [params[i] for i in rest], draws[rest])
    return tokens


def _num_kept(filters: _Filters, logits: torch.Tensor, params: Sequence[Asked], ranked: torch.Tensor) -> torch.Tensor:
    """``filters.num_kept`` for the largest weights ``ranked``, with the total of all only where a nucleus needs it."""
    vocab = logits.shape[1]
    total = ranked.sum(dim=-1, keepdim=True)
    if ranked.shape[1] == vocab or not any(p.top_p < 1 and not p.top_k for p in params):
        return filters.num_kept(ranked, total, vocab)
    padded = chunked(logits, _DRAW_CHUNK)
    peaks = chunk_maxima(padded, _DRAW_CHUNK).amax(dim=-1)
    scales = _scales(params)
    # The largest weighs 1.
    total = _shares(padded, peaks, scales).amax(dim=-1, keepdim=True).double().reciprocal_()
    fewest = filters.num_kept(ranked, total * (1 - _TOTAL_ERROR), vocab)
    most = filters.num_kept(ranked, total * (1 + _TOTAL_ERROR), vocab)
    unsure = (fewest != most).squeeze(1).nonzero().flatten().tolist()
    if unsure:
        total[unsure] = _weights(logits[unsure], [params[i] for i in unsure]).sum(dim=-1, keepdim=True)
        return filters.num_kept(ranked, total, vocab)
    return most


def _draw_in_order(logits: torch.Tensor, params: Sequence[Asked], draws: torch.Tensor) -> torch.Tensor:
    """[rows]; see ``draw_exactly``."""
    vocab = logits.shape[1]
    weights = _weights(logits, params)
    ranked, ids = weights.sort(dim=-1, descending=True, stable=True)
    num_kept = _Filters.of(params, vocab).num_kept(ranked, ranked.sum(dim=-1, keepdim=True), vocab)
    kept = torch.zeros_like(weights).scatter_(1, ids, ranked.masked_fill(torch.arange(vocab) >= num_kept, 0))
    return _invert(kept, draws)
