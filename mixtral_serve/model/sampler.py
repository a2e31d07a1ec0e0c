"""The next token of each row: greedy, or drawn after temperature, top-k, top-p and min-p.

Owns: ``sample``, and the random numbers it draws. The order: raw logits, from which the log-probabilities are; the
check that they are finite; masks; ``logit_processors`` (what parameters forbid, bias and penalise); temperature and
filters. The number for the token at position ``i`` of a choice is a
hash of (seed, choice, i): no state, so batch-mates, chunking, preemption and resumption cannot shift it.

What the filters mean, in this order: the logits are divided by the temperature; ``top_k`` keeps the k most
likely tokens; ``top_p`` the smallest set of most likely ones whose share of what is left reaches p; ``min_p``
those at least min_p times as likely as the most likely. Among equals the lowest id counts as more likely. Each
filter keeps at least one token.

Invariants: a row's outcome is a function of that row alone. A row that holds a NaN or an infinity yields an
error, found on the raw logits, before masks legally put minus infinity there.

Rejected: one ``torch.Generator`` per request (state that has to follow the request through preemptions); sorting the
whole vocabulary for each row (the filters need the order of the likely few only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import torch

from mixtral_serve.contract import SamplingParams
from mixtral_serve.model.likeliest import chunked, largest, top
from mixtral_serve.model.logit_processors import SampleRow, adjust, wishes
from mixtral_serve.model.logprobs import token_logprobs
from mixtral_serve.model.token_masks import apply_masks
from mixtral_serve.model.wide_rows import chunk_maxima, chunk_shares, finite_rows, near_totals
from scheduler.events import TokenLogprob

NON_FINITE: Final = "the model produced logits that are not finite"

_NUM_CANDIDATES: Final = 64
"""Most likely tokens that are looked at first; rows that keep more are sorted in full."""
_DRAW_CHUNK: Final = 256
"""Tokens whose shares are added up before it is decided among which of them to draw."""
_TOTAL_ERROR: Final = 2e-5
"""Twice what a total in fp32 may be off; a nucleus that this could change is cut by the exact one."""
_LEAST_TEMPERATURE: Final = 1e-30
"""A smaller one is not distinguishable from it, and would be 0 in fp32."""
_MASK_64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of one row: a token, or an error."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of one token: 53 bits of a hash of its coordinates."""
    words = b"".join((word & _MASK_64).to_bytes(8, "little") for word in (seed, choice, position))
    return (int.from_bytes(blake2b(words, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [rows, vocab], raw, fp32. Not changed.
        rows: what each row is for, aligned.
    """
    results: list[Sampled | None] = [None if ok else Sampled(error=NON_FINITE) for ok in finite_rows(logits)]
    live = [i for i, result in enumerate(results) if result is None]
    asks = [row.mask is not None or wishes(row) for row in rows]
    plain = [i for i in live if not asks[i]]
    tokens = dict(zip(plain, _choose(logits, rows, plain), strict=True))
    adjusted = [i for i in live if asks[i]]
    if adjusted:
        own, asked = logits[adjusted], [rows[i] for i in adjusted]
        outcomes = _adjusted(own, asked)
        for i, outcome in zip(adjusted, outcomes, strict=True):
            results[i] = outcome
        able = [i for i, outcome in enumerate(outcomes) if outcome is None]
        tokens.update(zip([adjusted[i] for i in able], _choose(own, asked, able), strict=True))
    logprobs = _logprobs(logits, rows, tokens)
    return [result or Sampled(tokens[i], logprobs.get(i)) for i, result in enumerate(results)]


def _choose(logits: torch.Tensor, rows: Sequence[SampleRow], chosen: Sequence[int]) -> list[int]:
    """Tokens of the ``chosen`` rows, whose logits are final."""
    tokens = dict.fromkeys(chosen, 0)
    greedy = [i for i in chosen if rows[i].params.temperature == 0]
    if greedy:
        tokens.update(zip(greedy, largest(_take(logits, greedy)).tolist(), strict=True))
    drawn = [i for i in chosen if rows[i].params.temperature != 0]
    if drawn:
        tokens.update(zip(drawn, _draw(_take(logits, drawn), [rows[i] for i in drawn]), strict=True))
    return list(tokens.values())


def _adjusted(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled | None]:
    """Apply masks and parameters to ``logits``, in place; the error of each row from which nothing can be chosen."""
    masked = apply_masks(logits, [row.mask for row in rows])
    faults = [first or second for first, second in zip(masked, adjust(logits, rows), strict=True)]
    return [None if fault is None else Sampled(error=fault) for fault in faults]


def _take(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The named rows (ascending), without a copy where they are all."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _logprobs(logits: torch.Tensor, rows: Sequence[SampleRow], tokens: dict[int, int]) -> dict[int, TokenLogprob]:
    """Row -> log-probability of its token, for rows that asked."""
    wanted = {i: k for i in sorted(tokens) if (k := rows[i].params.logprobs) is not None}
    if not wanted:
        return {}
    entries = token_logprobs(_take(logits, list(wanted)), [tokens[i] for i in wanted], list(wanted.values()))
    return dict(zip(wanted, entries, strict=True))


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Sample rows (minus infinity allowed) by inverting the cumulative distribution over ascending token ids."""
    draws = [uniform(row.params.seed, row.params.choice, row.position) for row in rows]
    order = torch.tensor(draws, dtype=torch.float64).unsqueeze(1)
    tokens = torch.zeros(len(rows), dtype=torch.int64)
    plain = [i for i, row in enumerate(rows) if not _filters(row.params)]
    if plain:
        tokens[plain] = _draw_plain(_take(logits, plain), [rows[i].params for i in plain], order[plain])
    filtered = [i for i, row in enumerate(rows) if _filters(row.params)]
    if filtered:
        params = [rows[i].params for i in filtered]
        tokens[filtered] = _draw_filtered(_take(logits, filtered), params, order[filtered])
    ids: list[int] = tokens.tolist()
    return ids


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _weights(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities up to a factor, the largest of each row 1: a tiny temperature cannot overflow."""
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64).unsqueeze(1)
    exact = logits.double()
    return (exact - exact.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()


def _scales(params: Sequence[SamplingParams]) -> torch.Tensor:
    """[rows], fp32: what logits are multiplied by."""
    return torch.tensor([1 / max(p.temperature, _LEAST_TEMPERATURE) for p in params])


def _draw_plain(logits: torch.Tensor, params: Sequence[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: tokens drawn from the whole vocabulary: first a chunk of it by its share, then a token of the chunk."""
    padded = chunked(logits, _DRAW_CHUNK)
    peaks = chunk_maxima(padded, _DRAW_CHUNK).amax(dim=-1)
    scales = _scales(params)
    shares = chunk_shares(padded, peaks, scales, _DRAW_CHUNK).double()
    chunk = _invert(shares, draws)
    rows = torch.arange(len(params))
    reached = shares.cumsum(dim=-1)
    inside = draws.squeeze(1) * reached[:, -1] - (reached[rows, chunk] - shares[rows, chunk])
    # In units of the chunk's own sum from here on: softmax is PyTorch's one exponential that treats rows alike.
    within = padded.view(len(params), -1, _DRAW_CHUNK)[rows, chunk]
    weights = (within - peaks.unsqueeze(1)).mul_(scales.unsqueeze(1)).softmax(dim=-1).double()
    share = (inside / shares[rows, chunk]).clamp_(0, 1).unsqueeze(1)
    return chunk * _DRAW_CHUNK + _invert(weights, share)


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
    def of(cls, params: Sequence[SamplingParams], vocab: int) -> _Filters:
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


def _draw_filtered(logits: torch.Tensor, params: Sequence[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
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
        tokens[rest] = _draw_exactly(logits[rest], [params[i] for i in rest], draws[rest])
    return tokens


def _num_kept(
    filters: _Filters, logits: torch.Tensor, params: Sequence[SamplingParams], ranked: torch.Tensor
) -> torch.Tensor:
    """``filters.num_kept`` for the largest weights ``ranked``, with the total of all only where a nucleus needs it."""
    vocab = logits.shape[1]
    total = ranked.sum(dim=-1, keepdim=True)
    if ranked.shape[1] == vocab or not any(p.top_p < 1 and not p.top_k for p in params):
        return filters.num_kept(ranked, total, vocab)
    padded = chunked(logits, _DRAW_CHUNK)
    peaks = chunk_maxima(padded, _DRAW_CHUNK).amax(dim=-1)
    scales = _scales(params)
    total = near_totals(padded, peaks, scales, _DRAW_CHUNK).unsqueeze(1)
    fewest = filters.num_kept(ranked, total * (1 - _TOTAL_ERROR), vocab)
    most = filters.num_kept(ranked, total * (1 + _TOTAL_ERROR), vocab)
    unsure = (fewest != most).squeeze(1).nonzero().flatten().tolist()
    if unsure:
        total[unsure] = _weights(logits[unsure], [params[i] for i in unsure]).sum(dim=-1, keepdim=True)
        return filters.num_kept(ranked, total, vocab)
    return most


def _draw_exactly(logits: torch.Tensor, params: Sequence[SamplingParams], draws: torch.Tensor) -> torch.Tensor:
    """[rows]: as ``_draw_filtered``, with the whole vocabulary in order and equals taken by ascending id."""
    vocab = logits.shape[1]
    weights = _weights(logits, params)
    ranked, ids = weights.sort(dim=-1, descending=True, stable=True)
    num_kept = _Filters.of(params, vocab).num_kept(ranked, ranked.sum(dim=-1, keepdim=True), vocab)
    kept = torch.zeros_like(weights).scatter_(1, ids, ranked.masked_fill(torch.arange(vocab) >= num_kept, 0))
    return _invert(kept, draws)
