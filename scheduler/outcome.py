"""What a step's result does to a request: check it against the plan, then apply it.

Owns the stop decision: an explicit finish from outside (a stop string, an error) first, then a stop token once
``min_tokens`` were sampled, then the length limit. A request that samples nothing ends with its prompt: an embedding
is complete (STOP), whoever may generate no token has reached that limit (LENGTH).
"""

from __future__ import annotations

from scheduler.errors import ProtocolError
from scheduler.events import Event, PromptScored, TokensCommitted
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan, StepResult
from scheduler.request import RequestKind, RequestState


def validate_result(plan: StepPlan, result: StepResult) -> None:
    """Check that ``result`` answers ``plan``, slice by slice.

    Raises:
        ProtocolError: it does not; the message names the first request that differs.
    """
    if len(result.results) != len(plan.slices):
        raise ProtocolError(f"{len(plan.slices)} slices were planned, {len(result.results)} results came")
    for scheduled, outcome in zip(plan.slices, result.results, strict=True):
        if outcome.request_id != scheduled.request_id:
            raise ProtocolError(
                f"{scheduled.request_id!r} was planned where a result for {outcome.request_id!r} stands"
            )
        if outcome.finish is None or outcome.finish is FinishReason.STOP:
            if (outcome.token_id is not None) is not scheduled.samples:
                raise ProtocolError(f"{scheduled.request_id!r}: a token comes exactly from slices that sample")
        elif outcome.finish is not FinishReason.ERROR:
            raise ProtocolError(f"{scheduled.request_id!r}: a runner cannot finish with {outcome.finish.value}")


def apply_result(
    state: RequestState, scheduled: ScheduledSlice, outcome: SliceResult, events: list[Event]
) -> FinishReason | None:
    """Advance ``state`` by one slice's result, append what happened to ``events``, and say whether it ends."""
    if outcome.finish is FinishReason.ERROR:
        return FinishReason.ERROR
    state.num_computed_tokens += scheduled.num_tokens
    if scheduled.pools:
        state.embedding = outcome.embedding
    if outcome.prompt_logprobs:
        _report_prompt_logprobs(state, scheduled, outcome, events)
    if not scheduled.samples:
        if state.num_pending_tokens:
            return None
        return FinishReason.STOP if state.kind is RequestKind.EMBED else FinishReason.LENGTH
    token_id = outcome.token_id
    assert token_id is not None, "validate_result saw to it"
    tokens = state.tokens
    request = state.request
    index = len(tokens) - len(request.prompt)
    tokens.append(token_id)
    events.append(TokensCommitted(request.id, index, token_id, outcome.logprob))
    stop = request.stop
    num_output_tokens = index + 1
    if outcome.finish is FinishReason.STOP:
        return FinishReason.STOP
    if token_id in stop.stop_token_ids and num_output_tokens >= stop.min_tokens:
        return FinishReason.STOP
    if num_output_tokens >= stop.max_tokens:
        return FinishReason.LENGTH
    return None


def _report_prompt_logprobs(
    state: RequestState, scheduled: ScheduledSlice, outcome: SliceResult, events: list[Event]
) -> None:
    """Report positions not reported before; a preempted request computes its prompt again, but says it once."""
    first = scheduled.start + 1
    last = scheduled.start + len(outcome.prompt_logprobs)
    fresh = max(first, state.num_reported_prompt_logprobs + 1)
    if fresh <= last:
        events.append(PromptScored(state.id, fresh, outcome.prompt_logprobs[fresh - first :]))
        state.num_reported_prompt_logprobs = last
