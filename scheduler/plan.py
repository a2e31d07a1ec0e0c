"""The language between the scheduler and whoever runs the model: a plan goes out, a result comes back.

Owns: ``StepPlan`` and ``ScheduledSlice`` (what to compute), ``StepResult`` and ``SliceResult`` (what came of
it). All frozen. They name no tensor and no library, so the same plan drives a real model, a fake one and a
simulator.

How a plan is read. One slice is one request's share of the step: the tokens at positions
``start .. start + num_tokens - 1``. The runner writes their keys and values to the slots that the block
table gives those positions (position ``p`` lives in block ``block_table[p // block_size]`` at offset
``p % block_size``), attends over positions ``0 .. p`` for each, and computes logits for the last
``num_logits`` of them.

``ScheduledSlice``, ``SliceResult`` and the event ``TokensCommitted`` are made once per running request and step;
they are named tuples because those cost a quarter of a frozen dataclass to make.

``tokens`` and ``block_table`` are the request's own append-only sequences, shared and not copied: a plan may
be read until it is committed, and a reader looks only at positions below ``start + num_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.events import Event, TokenLogprob
from scheduler.lifecycle import FinishReason
from scheduler.request import BlockId, RequestId


class ScheduledSlice(NamedTuple):
    """One request's share of a step."""

    request_id: RequestId
    start: int
    """Absolute position of the first token of the slice."""
    num_tokens: int
    """At least 1."""
    tokens: Sequence[int]
    """All known tokens of the request; the slice is ``tokens[start : start + num_tokens]``."""
    block_table: Sequence[BlockId]
    """Blocks of positions 0, block_size, 2 * block_size, ...; covers ``start + num_tokens`` positions."""
    num_logits: int
    """How many rows at the end of the slice need logits: 0, 1, or all of them when the prompt is scored."""
    samples: bool
    """Whether the last row yields a next token."""
    num_output_tokens: int
    """Tokens sampled so far: the position of the next token in the request's random stream."""
    pools: bool = False
    """Whether the rows' hidden states go into the request's embedding."""
    embedding: object | None = None
    """The runner's own partial embedding from the slice before; None at the first."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to compute in one step. ``slices`` may be empty when only events happened, or nothing at all."""

    step_id: int
    slices: tuple[ScheduledSlice, ...]
    events: tuple[Event, ...]
    """What planning itself caused: admissions, preemptions, evictions, deadlines."""

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(s.num_tokens for s in self.slices)


class SliceResult(NamedTuple):
    """What came of one slice."""

    request_id: RequestId
    token_id: int | None = None
    """The sampled token; given if and only if the slice ``samples`` and did not fail."""
    logprob: TokenLogprob | None = None
    """Of the sampled token, where the request asked for it."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For scored prompts: entry ``i`` belongs to the token at position ``start + i + 1`` (which row
    ``start + i`` predicts); rows that predict no known prompt token have no entry."""
    embedding: object | None = None
    """Partial embedding so far, or the finished one after the prompt's last token. Opaque to the scheduler."""
    finish: FinishReason | None = None
    """STOP where a stop string was found, ERROR where this request failed; None otherwise."""
    error: str | None = None
    """What failed, for logs. Given if and only if ``finish`` is ERROR."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan: one entry per slice, in the plan's order."""

    results: tuple[SliceResult, ...]

    @classmethod
    def failed(cls, plan: StepPlan, error: str) -> StepResult:
        """The result of a step whose runner raised: every slice ends its request with an error."""
        return cls(tuple(SliceResult(s.request_id, finish=FinishReason.ERROR, error=error) for s in plan.slices))
