"""What happened: frozen values, returned from ``add``, ``step``, ``commit`` and ``finish``, never called back.

Everything that a metric, a log line, a ledger row or a client's stream is made of is one of these. Every
request that ``add`` accepted ends in exactly one ``Finished``; nothing about it follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from scheduler.lifecycle import FinishReason
from scheduler.request import BlockId, RequestId


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token and of the most likely alternatives at its position.

    Of the raw logits: before temperature, masks and penalties.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most likely first."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A waiting request started to run."""

    request_id: RequestId
    num_prompt_tokens: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """A preempted request runs again."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Preempted:
    """A running request gave its blocks back; it will be recomputed (or found in the prefix cache) later."""

    request_id: RequestId
    num_computed_tokens: int
    """Tokens whose keys and values it gave up."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The prefix cache was asked for a request's leading blocks (at admission and at each resume)."""

    request_id: RequestId
    num_queried_tokens: int
    num_hit_tokens: int
    first: bool
    """True at the first admission, False on a resume."""


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of prompt tokens ``first_position ..``; each position is reported once."""

    request_id: RequestId
    first_position: int
    logprobs: tuple[TokenLogprob, ...]


class TokensCommitted(NamedTuple):
    """A token was sampled and belongs to the output. ``output_index`` runs 0, 1, 2, ... without gap or repeat."""

    request_id: RequestId
    output_index: int
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class BlockEvicted:
    """A cached block was reused for something else."""

    block_id: BlockId


@dataclass(frozen=True, slots=True)
class Finished:
    """The request is over. Always the last event that names it."""

    request_id: RequestId
    reason: FinishReason
    num_output_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache supplied at the first admission."""
    error: str | None = None
    embedding: object | None = None


Event: TypeAlias = Admitted | Resumed | Preempted | PrefixHit | PromptScored | TokensCommitted | BlockEvicted | Finished
