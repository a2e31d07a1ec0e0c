"""Drawing tokens with PyTorch's operators, for machines without compiled kernels.

Owns: ``draw``. What the filters mean says ``sampler``. How a token is drawn, here and in ``csrc/choice.cpp``:

* From what filters leave: where the row's random number falls in the cumulative distribution over ascending ids.
* From the whole vocabulary, by rejection: a chunk of 64 tokens is proposed by the weight of its most likely one, then
  one of its 64 places; the token there is accepted with the share that its weight is of the chunk's largest. So each
  token is accepted in proportion to its own weight, for one exponential in 64 tokens and one in each trial. A trial
  takes two words of a sequence that the row's random number begins; one in 64 or more is accepted on average.

Invariant: a row's token is a function of that row alone.

Rejected: sorting the whole vocabulary for each row (the filters need the order of the likely few only); inverting the
cumulative distribution of the whole vocabulary (an exponential of every logit was a fifth of what a step costs outside
the forward); as many random numbers as there are trials from ``sampler.uniform`` (nobody knows how many in advance).
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
_CHUNK: Final = 64
"""Tokens that are proposed together; the compiled kernels' too, or they would draw others."""
_TRIALS: Final = 64
"""That are made at once."""
_MOST_TRIALS: Final = 8192
"""After so many without a token, which no row of numbers comes to, it is drawn otherwise."""
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
    """The random number, in [0, 1), a multiple of 2^-53."""


def draw(logits: torch.Tensor, asked: Sequence[Asked]) -> list[int]:
    """A token per row, as the module's header says.

    Args:
        logits: fp32 [rows, vocab], minus infinity allowed.
        asked: of each row; the temperature is not 0.
    """
    tokens = dict.fromkeys(range(len(asked)), 0)
    for draw_all, wanted in ((_draw_plain, False), (_draw_filtered, True)):
        rows = [i for i, params in enumerate(asked) if _filters(params, logits.shape[1]) is wanted]
        if rows:
            params = [asked[i] for i in rows]
            draws = torch.tensor([p.draw for p in params], dtype=torch.float64).unsqueeze(1)
            tokens.update(zip(rows, draw_all(logits[rows], params, draws).tolist(), strict=True))
    return list(tokens.values())


def _filters(params: Asked, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1 or params.min_p > 0


def _weights(logits: torch.Tensor, params: Sequence[Asked]) -> torch.Tensor:
    """Probabilities up to a factor, the largest of each row 1: a tiny temperature cannot overflow."""
    return _weights_to(logits.amax(dim=-1, keepdim=True), logits, params)


def _weights_to(peaks: torch.Tensor, logits: torch.Tensor, params: Sequence[Asked]) -> torch.Tensor:
    """fp64 [rows, n]: the weight of each of ``logits`` in units of that of its peak, but for its last bit."""
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64).unsqueeze(1)
    return (logits.double() - peaks.double()).div_(temperatures).exp_()


def _draw_plain(logits: torch.Tensor, params: Sequence[Asked], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: tokens drawn from the whole vocabulary."""
    padded = chunked(logits, _CHUNK)
    maxima = chunk_maxima(padded, _CHUNK)
    bounds = _weights(maxima, params)
    tokens = torch.zeros(len(params), 1, dtype=torch.int64)
    pending = torch.ones(len(params), 1, dtype=torch.bool)
    for first in range(0, _MOST_TRIALS, _TRIALS):
        words = _words(draws, 2 * first, 2 * _TRIALS)
        chunks = _invert(bounds, _fractions(words[:, ::2]))
        ids = chunks * _CHUNK + _shifted(words[:, 1::2], 58)
        weights = _weights_to(maxima.gather(1, chunks), padded.gather(1, ids), params)
        is_accepted = _fractions(words[:, 1::2] << 6) < weights
        tokens = torch.where(pending, ids.gather(1, is_accepted.int().argmax(dim=-1, keepdim=True)), tokens)
        pending &= ~is_accepted.any(dim=-1, keepdim=True)
        if not pending.any():
            break
    rest = pending.squeeze(1).nonzero().flatten().tolist()
    if rest:
        tokens[rest] = _draw_in_order(logits[rest], [params[i] for i in rest], draws[rest]).unsqueeze(1)
    return tokens.squeeze(1)


def _words(draws: torch.Tensor, first: int, num: int) -> torch.Tensor:
    """int64 [rows, num]: words of 64 bits, from the ``first`` on, of the sequence that each of ``draws`` begins.

    Source: SplitMix64 of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014). Integers wrap.
    """
    words = (draws * 2.0**53).long() + torch.arange(first + 1, first + num + 1) * (0x9E3779B97F4A7C15 - 2**64)
    words = (words ^ _shifted(words, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    words = (words ^ _shifted(words, 27)) * (0x94D049BB133111EB - 2**64)
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """To the right, with zeros on the left."""
    return (words >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _fractions(words: torch.Tensor) -> torch.Tensor:
    """fp64: the upper 53 bits, in [0, 1)."""
    return _shifted(words, 11).double() * 2.0**-53


def _shares(rows: torch.Tensor, peaks: torch.Tensor, params: Sequence[Asked]) -> torch.Tensor:
    """fp32 [rows, width]: the distribution of each row, whose largest number is given as [rows, 1].

    Of PyTorch's exponentials only that of softmax treats a row alike wherever it stands.
    """
    scales = torch.tensor([1 / max(p.temperature, _LEAST_TEMPERATURE) for p in params]).unsqueeze(1)
    return functional.softmax((rows - peaks).mul_(scales), dim=-1)


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """As ``draws`` [rows, n]: the first column whose cumulative weight exceeds that share of the row's total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, draws * total, right=True)
    # Rounding may lift the target to the total; the last column with a weight is meant then.
    return torch.minimum(found, torch.searchsorted(cumulative, total))


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
    tokens = ids.gather(1, _invert(kept, draws)).squeeze(1)
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
    padded = chunked(logits, _CHUNK)
    peaks = chunk_maxima(padded, _CHUNK).amax(dim=-1, keepdim=True)
    # The largest weighs 1.
    total = _shares(padded, peaks, params).amax(dim=-1, keepdim=True).double().reciprocal_()
    fewest = filters.num_kept(ranked, total * (1 - _TOTAL_ERROR), vocab)
    most = filters.num_kept(ranked, total * (1 + _TOTAL_ERROR), vocab)
    unsure = (fewest != most).squeeze(1).nonzero().flatten().tolist()
    if unsure:
        total[unsure] = _weights(logits[unsure], [params[i] for i in unsure]).sum(dim=-1, keepdim=True)
        return filters.num_kept(ranked, total, vocab)
    return most


def _draw_in_order(logits: torch.Tensor, params: Sequence[Asked], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: tokens drawn from what the filters leave of the whole vocabulary in order, equals by ascending id."""
    vocab = logits.shape[1]
    weights = _weights(logits, params)
    ranked, ids = weights.sort(dim=-1, descending=True, stable=True)
    num_kept = _Filters.of(params, vocab).num_kept(ranked, ranked.sum(dim=-1, keepdim=True), vocab)
    kept = torch.zeros_like(weights).scatter_(1, ids, ranked.masked_fill(torch.arange(vocab) >= num_kept, 0))
    return _invert(kept, draws).squeeze(1)
