"""The next token of each row: greedy, or drawn after temperature, top-k, top-p and min-p.

Owns: ``prepare`` and ``sample``, and the random numbers of the draws, which ``choice`` carries out. The order: raw
logits, from which the log-probabilities are; the check that they are finite; masks; ``logit_processors`` (what
parameters forbid, bias and penalise); temperature and filters. The number for the token at position ``i`` of a choice
is a hash of (seed, choice, i): no state, so batch-mates, chunking, preemption and resumption cannot shift it.

What the filters mean, in this order: the logits are divided by the temperature; ``top_k`` keeps the k most
likely tokens; ``top_p`` the smallest set of most likely ones whose share of what is left reaches p; ``min_p``
those at least min_p times as likely as the most likely. Among equals the lowest id counts as more likely. Each
filter keeps at least one token.

Invariants: a row's outcome is a function of that row alone. A row that holds a NaN or an infinity yields an
error, found on the raw logits, before masks legally put minus infinity there.

Rejected: one ``torch.Generator`` per request (state that has to follow the request through preemptions).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct
from typing import Final, NamedTuple

import torch

from mixtral_serve.model.choice import choose
from mixtral_serve.model.draws import Asked
from mixtral_serve.model.logit_processors import SampleRow, adjust, wishes
from mixtral_serve.model.logprobs import token_logprobs
from mixtral_serve.model.token_masks import apply_masks
from mixtral_serve.model.wide_rows import finite_rows
from scheduler.events import TokenLogprob

NON_FINITE: Final = "the model produced logits that are not finite"

_MASK_64: Final = (1 << 64) - 1
_WORDS: Final = Struct("<3Q")


class Sampled(NamedTuple):
    """What came of one row: a token, or an error."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of one token: 53 bits of a hash of its coordinates."""
    words = _WORDS.pack(seed & _MASK_64, choice & _MASK_64, position & _MASK_64)
    return (int.from_bytes(blake2b(words, digest_size=8).digest(), "little") >> 11) * 2.0**-53


class Prepared(NamedTuple):
    """What can be said of rows before their logits are there."""

    rows: Sequence[SampleRow]
    asked: Sequence[Asked]
    adjusted: Sequence[int]
    """Rows that a mask or a parameter changes the logits of."""


def prepare(rows: Sequence[SampleRow]) -> Prepared:
    """Call it before the logits are computed: the threads that compute them stay awake for a short while only."""
    return Prepared(rows, _asked(rows), [i for i, row in enumerate(rows) if row.mask is not None or wishes(row)])


def sample(logits: torch.Tensor, prepared: Prepared) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: [rows, vocab], raw, fp32. Not changed.
        prepared: what each row is for, aligned.
    """
    rows, asked, adjusted = prepared
    if not adjusted:
        outcomes = _choose_plain(logits, asked)
    else:
        outcomes = [NON_FINITE] * len(rows)
        plain = sorted(set(range(len(rows))).difference(adjusted))
        for i, outcome in zip(plain, _choose_plain(logits[plain], [asked[i] for i in plain]), strict=True):
            outcomes[i] = outcome
        for i, outcome in zip(adjusted, _choose_adjusted(logits[adjusted], prepared), strict=True):
            outcomes[i] = outcome
    logprobs = _logprobs(logits, rows, outcomes)
    return [
        Sampled(error=outcome) if isinstance(outcome, str) else Sampled(outcome, logprobs.get(i))
        for i, outcome in enumerate(outcomes)
    ]


def _choose_plain(logits: torch.Tensor, asked: Sequence[Asked]) -> list[int | str]:
    """A token per row of raw ``logits``, or why there is none."""
    return [NON_FINITE if token is None else token for token in choose(logits, asked, is_raw=True)]


def _asked(rows: Sequence[SampleRow]) -> list[Asked]:
    """What rows ask for, and the random number of each that draws."""
    asked = []
    for row in rows:
        params = row.params
        draw = uniform(params.seed, params.choice, row.position) if params.temperature else 0.0
        asked.append(Asked(params.temperature, params.top_k, params.top_p, params.min_p, draw))
    return asked


def _choose_adjusted(logits: torch.Tensor, prepared: Prepared) -> list[int | str]:
    """Apply masks and parameters to the adjusted rows' raw ``logits``, in place; a token each, or why there is none."""
    rows = [prepared.rows[i] for i in prepared.adjusted]
    not_finite = [None if ok else NON_FINITE for ok in finite_rows(logits)]
    faults = zip(not_finite, apply_masks(logits, [row.mask for row in rows]), adjust(logits, rows), strict=True)
    outcomes: list[int | str] = [first or second or third or 0 for first, second, third in faults]
    able = [i for i, outcome in enumerate(outcomes) if outcome == 0]
    asked = [prepared.asked[prepared.adjusted[i]] for i in able]
    for i, token in zip(able, choose(_take(logits, able), asked, is_raw=False), strict=True):
        assert token is not None, "only raw rows are asked whether they are finite"
        outcomes[i] = token
    return outcomes


def _take(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The named rows (ascending), without a copy where they are all."""
    return logits if len(rows) == logits.shape[0] else logits[list(rows)]


def _logprobs(
    logits: torch.Tensor, rows: Sequence[SampleRow], outcomes: Sequence[int | str]
) -> dict[int, TokenLogprob]:
    """Row -> log-probability of its token, for rows that asked and have one."""
    wanted = {
        i: (token, k)
        for i, token in enumerate(outcomes)
        if (k := rows[i].params.logprobs) is not None and not isinstance(token, str)
    }
    if not wanted:
        return {}
    tokens, nums = zip(*wanted.values(), strict=True)
    entries = token_logprobs(_take(logits, list(wanted)), list(tokens), list(nums))
    return dict(zip(wanted, entries, strict=True))
