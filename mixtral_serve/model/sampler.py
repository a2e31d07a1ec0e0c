"""The next token of each row: greedy, or drawn after temperature, top-k, top-p and min-p.

Owns: ``sample``, and the random numbers it draws. The number for the token at position ``i`` of a choice is a
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

from mixtral_serve.contract import SamplingParams, TokenMask
from mixtral_serve.model.logprobs import token_logprobs
from scheduler.plan import TokenLogprob

NON_FINITE: Final = "the model produced logits that are not finite"

_NUM_CANDIDATES: Final = 128
"""Most likely tokens that are looked at first; rows whose nucleus is wider are sorted in full."""
_MASK_64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is for."""

    params: SamplingParams
    position: int
    """Index of the token among the request's output tokens."""
    mask: TokenMask | None = None


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


def finite_rows(logits: torch.Tensor) -> list[bool]:
    """Which rows of ``logits`` [rows, vocab] hold finite numbers only."""
    # A sum is finite only if its terms are, and takes a fifth of the time; the rare sum that is not is looked into.
    finite: list[bool] = torch.isfinite(logits.sum(dim=-1)).tolist()
    return [ok or bool(torch.isfinite(row).all()) for ok, row in zip(finite, logits, strict=True)]


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [rows, vocab], raw, fp32. Not changed.
        rows: what each row is for, aligned.
    """
    results: list[Sampled | None] = [None if ok else Sampled(error=NON_FINITE) for ok in finite_rows(logits)]
    allowed = _apply_masks(logits, rows, results)
    live = [i for i, result in enumerate(results) if result is None]
    tokens = dict.fromkeys(live, 0)
    greedy = [i for i in live if rows[i].params.temperature == 0]
    tokens.update(zip(greedy, _take(allowed, greedy).argmax(dim=-1).tolist() if greedy else (), strict=True))
    drawn = [i for i in live if rows[i].params.temperature != 0]
    if drawn:
        tokens.update(zip(drawn, _draw(_take(allowed, drawn), [rows[i] for i in drawn]), strict=True))
    logprobs = _logprobs(logits, rows, tokens)
    return [result or Sampled(tokens[i], logprobs.get(i)) for i, result in enumerate(results)]


def _take(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The named rows, without a copy where they are all."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _apply_masks(logits: torch.Tensor, rows: Sequence[SampleRow], results: list[Sampled | None]) -> torch.Tensor:
    """``logits`` with minus infinity where a mask forbids a token; a mask that fails ends its own row only."""
    masked = logits
    for i, row in enumerate(rows):
        if row.mask is None or results[i] is not None:
            continue
        try:
            ids = torch.tensor(list(row.mask.allowed_token_ids()), dtype=torch.int64)
            allowed = logits[i, ids]
        except Exception as error:  # noqa: BLE001 - whatever a grammar raises must not reach its batch-mates
            results[i] = Sampled(error=f"the token mask failed: {type(error).__name__}")
            continue
        if ids.numel() == 0:
            results[i] = Sampled(error="the token mask allows no token")
            continue
        if masked is logits:
            masked = logits.clone()
        masked[i] = float("-inf")
        masked[i, ids] = allowed
    return masked


def _logprobs(logits: torch.Tensor, rows: Sequence[SampleRow], tokens: dict[int, int]) -> dict[int, TokenLogprob]:
    """Row -> log-probability of its token, for rows that asked."""
    wanted = {i: k for i in tokens if (k := rows[i].params.logprobs) is not None}
    if not wanted:
        return {}
    entries = token_logprobs(_take(logits, list(wanted)), [tokens[i] for i in wanted], list(wanted.values()))
    return dict(zip(wanted, entries, strict=True))


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Sample rows by inverting the cumulative distribution over token ids, in double precision."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64).unsqueeze(1)
    # The largest logit is taken off first: it is the same distribution, and a tiny temperature cannot overflow.
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperatures
    weights = scaled.exp_()
    filtered = [i for i, row in enumerate(rows) if _filters(row.params)]
    if filtered:
        weights[filtered] = _filter(weights[filtered], [rows[i].params for i in filtered])
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    draws = [uniform(row.params.seed, row.params.choice, row.position) for row in rows]
    target = torch.tensor(draws, dtype=torch.float64).unsqueeze(1) * total
    # The first id whose cumulative weight exceeds the target, which therefore has a weight of its own. Rounding
    # may lift the target to the total; the last id with a weight is meant then.
    found = torch.searchsorted(cumulative, target, right=True)
    ids: list[int] = torch.minimum(found, torch.searchsorted(cumulative, total)).squeeze(1).tolist()
    return ids


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _filter(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """``weights`` [rows, vocab], the largest of each row 1, with the dropped tokens at zero."""
    vocab = weights.shape[1]
    top_k = torch.tensor([min(p.top_k, vocab) or vocab for p in params]).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).unsqueeze(1)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64).unsqueeze(1)
    width = min(vocab, max(_NUM_CANDIDATES, *(p.top_k for p in params)))
    return _most_likely(weights, top_k, top_p, width).masked_fill_(weights < min_p, 0)


def _most_likely(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int) -> torch.Tensor:
    """Top-k and top-p by looking at the ``width`` most likely tokens first; ``top_k`` is the vocabulary where off."""
    vocab = weights.shape[1]
    ranked = torch.topk(weights, width, dim=-1).values
    cumulative = ranked.cumsum(dim=-1)
    left = torch.where(
        top_k < vocab, cumulative.gather(1, top_k.clamp(max=width) - 1), weights.sum(dim=-1, keepdim=True)
    )
    nucleus = (cumulative < top_p * left).sum(dim=-1, keepdim=True) + 1
    num_kept = torch.minimum(top_k, torch.where(top_p < 1, nucleus.clamp(max=vocab), vocab))
    # The n most likely: all above the n-th weight, and of those equal to it the lowest ids.
    least = ranked.gather(1, num_kept.clamp(max=width) - 1)
    above, equal = weights > least, weights == least
    room = num_kept - above.sum(dim=-1, keepdim=True)
    kept = weights.masked_fill(~(above | (equal & (equal.cumsum(dim=-1) <= room))), 0)
    beyond = (num_kept > width).squeeze(1)
    if bool(beyond.any()):
        unfiltered = (num_kept == vocab).squeeze(1)
        kept[unfiltered] = weights[unfiltered]
        wider = beyond & ~unfiltered
        if bool(wider.any()):
            kept[wider] = _most_likely(weights[wider], top_k[wider], top_p[wider], vocab)
    return kept
