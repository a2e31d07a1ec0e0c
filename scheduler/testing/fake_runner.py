"""``KVHonestRunner``: a fake model whose answers betray every mistake with the KV cache.

A real model's next token depends on the keys and values that it gathers through the block table. So does
this one's: a slot of its cache holds the token whose keys would be there, and the next token is a hash of all
the tokens **gathered through the table**, never of the tokens in the plan. If two requests share a block that
they should not, if a block is reused too early, if a cached block was never written or is another tenant's,
if a slot is off by one, then some output differs from what the prompt alone determines (``reference_output``),
and one equality test is the oracle for all of it (law I25).

Slots begin unwritten, and gathering an unwritten slot changes the answer like any wrong token does. A step
can be made to fail in the ways a real one fails: it raises half-way, or one request's numbers are not finite
and its slots are poisoned.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Final

from scheduler.events import TokenLogprob
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan, StepResult
from scheduler.request import TOKEN_TYPECODE, BlockId, Request, RequestId, RequestKind

UNWRITTEN: Final = -1
POISON: Final = -2


class Fault(Enum):
    """How one slice of a step goes wrong, or ends early."""

    NOT_FINITE = "not finite"
    """The request's numbers are not finite: its slots are poisoned, the result is an ERROR."""
    STOP_STRING = "stop string"
    """Text outside the scheduler's sight ends the request with this token."""


class StepCrash(Exception):
    """The runner raised in the middle of a step: some slots are written, nothing was returned."""


@dataclass(frozen=True, slots=True)
class HonestModel:
    """The fake model itself: tokens in, next token out. ``vocab_size`` counts end-of-sequence, which is 0."""

    vocab_size: int = 3
    eos_one_in: int = 7
    """About one token in so many is end-of-sequence."""

    def digest(self, gathered: Sequence[int]) -> int:
        """64 bits that depend on every gathered token and its position."""
        data = array(TOKEN_TYPECODE, gathered).tobytes()
        return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")

    def next_token(self, gathered: Sequence[int]) -> int:
        """The token after ``gathered``."""
        number = self.digest(gathered)
        if number % self.eos_one_in == 0:
            return 0
        return 1 + (number >> 8) % (self.vocab_size - 1)

    def logprob(self, gathered: Sequence[int], token_id: int) -> TokenLogprob:
        """A made-up log-probability that depends on everything it should."""
        return TokenLogprob(token_id, -(self.digest([*gathered, token_id]) % 1000) / 100)


class KVHonestRunner:
    """Runs plans over a paged cache of token ids. ``block_size`` as the scheduler's."""

    def __init__(self, num_blocks: int, block_size: int, model: HonestModel | None = None) -> None:
        self.model = model or HonestModel()
        self._block_size = block_size
        self._slots = [UNWRITTEN] * (num_blocks * block_size)

    def run(
        self, plan: StepPlan, faults: Mapping[RequestId, Fault] | None = None, *, crash_after: int | None = None
    ) -> StepResult:
        """Compute every slice.

        Raises:
            StepCrash: ``crash_after`` slices were computed and the next one was asked for.
        """
        # All writes come first, as in a real forward pass: a slice that is written through somebody else's
        # block is then seen by that somebody in the same step.
        for index, scheduled in enumerate(plan.slices):
            if index == crash_after:
                raise StepCrash
            self._write(scheduled)
        faults = faults or {}
        return StepResult(tuple(self._result(s, faults.get(s.request_id)) for s in plan.slices))

    def gather(self, block_table: Sequence[BlockId], num_tokens: int) -> list[int]:
        """What the cache holds at positions 0 to ``num_tokens - 1`` of a table."""
        size = self._block_size
        return [self._slots[block_table[position // size] * size + position % size] for position in range(num_tokens)]

    def _write(self, scheduled: ScheduledSlice) -> None:
        for position in range(scheduled.start, scheduled.start + scheduled.num_tokens):
            self._slots[self._slot(scheduled, position)] = scheduled.tokens[position]

    def _slot(self, scheduled: ScheduledSlice, position: int) -> int:
        return scheduled.block_table[position // self._block_size] * self._block_size + position % self._block_size

    def _result(self, scheduled: ScheduledSlice, fault: Fault | None) -> SliceResult:
        request_id, start, end = scheduled.request_id, scheduled.start, scheduled.start + scheduled.num_tokens
        if fault is Fault.NOT_FINITE:
            for position in range(start, end):
                self._slots[self._slot(scheduled, position)] = POISON
            return SliceResult(request_id, finish=FinishReason.ERROR, error="logits are not finite")
        gathered = self.gather(scheduled.block_table, end)
        token_id = self.model.next_token(gathered) if scheduled.samples else None
        num_prompt_tokens = len(scheduled.tokens) - scheduled.num_output_tokens
        # Logits for every row mean that the prompt is scored; where a lone row is just sampled, the range is empty.
        is_scored = scheduled.num_logits == scheduled.num_tokens
        scored = range(start, min(end, num_prompt_tokens - 1)) if is_scored else range(0)
        return SliceResult(
            request_id,
            token_id,
            logprob=None if token_id is None else self.model.logprob(gathered, token_id),
            prompt_logprobs=tuple(
                self.model.logprob(gathered[: position + 1], scheduled.tokens[position + 1]) for position in scored
            ),
            embedding=self._pool(scheduled, gathered) if scheduled.pools else None,
            finish=FinishReason.STOP if fault is Fault.STOP_STRING and scheduled.samples else None,
        )

    def _pool(self, scheduled: ScheduledSlice, gathered: Sequence[int]) -> object:
        """A running sum over positions: wrong if a chunk is left out, doubled or read wrongly."""
        partial = scheduled.embedding if isinstance(scheduled.embedding, int) else 0
        return partial + sum(self.model.digest(gathered[: p + 1]) for p in range(scheduled.start, len(gathered)))


@dataclass(frozen=True, slots=True)
class ReferenceOutput:
    """What a request must yield if nothing interferes, whatever batch, chunks, cache or preemptions it meets."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    embedding: object | None


def reference_output(model: HonestModel, request: Request) -> ReferenceOutput:
    """Compute the request alone and at once, without blocks, steps or a scheduler."""
    tokens = list(request.prompt)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    if request.scores_prompt:
        prompt_logprobs = tuple(model.logprob(tokens[:i], tokens[i]) for i in range(1, len(tokens)))
    if request.kind is RequestKind.EMBED:
        pooled = sum(model.digest(tokens[: i + 1]) for i in range(len(tokens)))
        return ReferenceOutput((), FinishReason.STOP, (), prompt_logprobs, pooled)
    output: list[int] = []
    logprobs: list[TokenLogprob] = []
    reason = FinishReason.LENGTH
    while len(output) < request.stop.max_tokens:
        token_id = model.next_token(tokens)
        logprobs.append(model.logprob(tokens, token_id))
        tokens.append(token_id)
        output.append(token_id)
        if token_id in request.stop.stop_token_ids and len(output) >= request.stop.min_tokens:
            reason = FinishReason.STOP
            break
    return ReferenceOutput(tuple(output), reason, tuple(logprobs), prompt_logprobs, None)
