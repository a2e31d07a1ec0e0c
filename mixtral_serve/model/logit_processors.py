"""What a request's parameters do to its logits before a token is chosen: what is forbidden, biased and penalised.

Owns: ``SampleRow`` (what one row of logits is for), ``wishes`` and ``adjust``. The sampler hands over a copy of the
rows that wish for something, and of no other: who asks for nothing costs nothing.

The order, which is vLLM's: the grammar's mask came before; then ``allowed_token_ids``; then ``bad_words`` and, before
``min_tokens`` output tokens, ``suppressed_token_ids`` are forbidden; then ``logit_bias`` is added; then the repetition
penalty, the frequency penalty and the presence penalty. Temperature and filters come after. What is forbidden (minus
infinity) stays forbidden: nothing that follows lifts it. Log-probabilities are of the raw logits and see none of it.

What counts: frequency and presence look at the output alone, repetition at prompt and output. A bad word is forbidden
to be completed where all of it lies in the output. The token at output index ``i`` is none of the suppressed ones
while ``i < min_tokens``.

Invariants: a row's outcome is a function of that row alone, bit for bit: every operation is one correctly rounded
operation per number, and the counts are whole numbers. A row in which everything is forbidden, or which is not finite
any more, is told by ``adjust`` and disturbs nobody.

Rejected: counts of tokens kept per request (the runner is stateless, and counting 4,000 tokens takes some ten
microseconds); one operation over the rows of a step (three times slower: a row's logits fit the inner caches).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from mixtral_serve.contract import SamplingParams, TokenMask
from scheduler.request import TOKEN_TYPECODE

ALL_FORBIDDEN: Final = "the request's parameters forbid every token"
NOT_FINITE_ANY_MORE: Final = "the request's parameters made logits that are not finite"

_FORBIDDEN: Final = float("-inf")


class SampleRow(NamedTuple):
    """What one row of logits is for."""

    params: SamplingParams
    position: int
    """Index of the token among the request's output tokens."""
    mask: TokenMask | None = None
    tokens: Sequence[int] = ()
    """The request's known tokens: its prompt, then ``position`` output tokens."""

    @property
    def output(self) -> Sequence[int]:
        """The output so far."""
        return self.tokens[len(self.tokens) - self.position :]


def wishes(row: SampleRow) -> bool:
    """Whether ``adjust`` would change the row's logits."""
    params = row.params
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or (params.suppressed_token_ids and row.position < params.min_tokens)
        or params.repetition_penalty != 1
        or (row.position and (params.frequency_penalty or params.presence_penalty))
    )


def adjust(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[str | None]:
    """Apply each row's parameters to its logits.

    Args:
        logits: [rows, vocab], fp32, contiguous; changed in place. Minus infinity where a mask forbids a token.
        rows: what each row is for, aligned; their token ids are below vocab.

    Returns:
        Per row: None, or why no token can be chosen.
    """
    for row_logits, row in zip(logits, rows, strict=True):
        _restrict(row_logits, row)
        _penalise(row_logits, row)
    return [_fault(peak) for peak in logits.amax(dim=-1).tolist()]


def _fault(peak: float) -> str | None:
    if peak == _FORBIDDEN:
        return ALL_FORBIDDEN
    return None if abs(peak) < float("inf") else NOT_FINITE_ANY_MORE  # a maximum hands on a NaN


def _restrict(logits: torch.Tensor, row: SampleRow) -> None:
    """Forbid and bias tokens of one row, [vocab]."""
    params = row.params
    if params.allowed_token_ids:
        allowed = _indices(params.allowed_token_ids)
        values = logits.index_select(0, allowed)
        logits.fill_(_FORBIDDEN).scatter_(0, allowed, values)
    forbidden = [word[-1] for word in params.bad_words if _is_begun(word, row)]
    if row.position < params.min_tokens:
        forbidden += params.suppressed_token_ids
    if forbidden:
        logits.index_fill_(0, _indices(forbidden), _FORBIDDEN)
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, _indices(ids), torch.frombuffer(array("f", biases), dtype=torch.float32))


def _is_begun(word: Sequence[int], row: SampleRow) -> bool:
    """Whether the output ends with all of ``word`` but its last token."""
    num_before = len(word) - 1
    return num_before <= row.position and tuple(row.tokens[len(row.tokens) - num_before :]) == tuple(word[:-1])


def _penalise(logits: torch.Tensor, row: SampleRow) -> None:
    """Apply the penalties of one row, [vocab]. A token that occurs twice is written twice, with the same value."""
    params = row.params
    if params.repetition_penalty != 1 and row.tokens:
        known = _indices(row.tokens)
        values = logits.index_select(0, known)
        divided, multiplied = values / params.repetition_penalty, values * params.repetition_penalty
        # Of the two the smaller is meant, whatever the sign, or the larger where the "penalty" rewards.
        change = torch.minimum if params.repetition_penalty > 1 else torch.maximum
        logits.scatter_(0, known, change(divided, multiplied))
    if row.position and (params.frequency_penalty or params.presence_penalty):
        output = _indices(row.output)
        values = logits.index_select(0, output)
        if params.frequency_penalty:
            counts = torch.zeros_like(logits).scatter_add_(0, output, torch.ones(len(output)))
            values -= counts.index_select(0, output).mul_(params.frequency_penalty)
        logits.scatter_(0, output, values.sub_(params.presence_penalty))


def _indices(token_ids: Sequence[int]) -> torch.Tensor:
    """Token ids as indices. Through an array, which takes a known prompt as it is and any other list eight times as
    fast as a tensor does."""
    return torch.frombuffer(array(TOKEN_TYPECODE, token_ids), dtype=torch.int32).long()
