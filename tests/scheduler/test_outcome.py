"""What a result does: the checks against the plan, the stop decision, what is reported once."""

from __future__ import annotations

import pytest

from scheduler.draft import StepDraft
from scheduler.errors import ProtocolError
from scheduler.events import Event, PromptScored, TokenLogprob, TokensCommitted
from scheduler.lifecycle import FinishReason
from scheduler.outcome import apply_result, validate_result
from scheduler.plan import ScheduledSlice, SliceResult, StepResult
from scheduler.request import RequestId, RequestKind, RequestState
from scheduler.testing import make_request

R = RequestId("r")


def a_state(**fields: object) -> RequestState:
    return RequestState(make_request("r", [1, 2, 3], **fields), 0)  # type: ignore[arg-type]


def planned(state: RequestState, num_tokens: int) -> ScheduledSlice:
    draft = StepDraft(100)
    draft.schedule(state, num_tokens)
    return draft.plan(0).slices[0]


def outcome_of(state: RequestState, result: SliceResult, num_tokens: int | None = None) -> FinishReason | None:
    return apply_result(state, planned(state, num_tokens or state.num_pending_tokens), result, [])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (StepResult(()), "1 slices were planned, 0 results came"),
        (StepResult((SliceResult(RequestId("x"), 5),)), "'r' was planned where a result for 'x' stands"),
        (StepResult((SliceResult(R),)), "a token comes exactly from slices that sample"),
        (StepResult((SliceResult(R, finish=FinishReason.STOP),)), "a token comes exactly from slices that sample"),
        (StepResult((SliceResult(R, 5, finish=FinishReason.LENGTH),)), "cannot finish with length"),
        (StepResult((SliceResult(R, 5, finish=FinishReason.CANCELLED),)), "cannot finish with cancelled"),
    ],
)
def test_a_result_that_does_not_answer_the_plan_is_refused(result: StepResult, message: str) -> None:
    draft = StepDraft(10)
    draft.schedule(a_state(), 3)
    with pytest.raises(ProtocolError, match=message):
        validate_result(draft.plan(0), result)


def test_a_token_from_a_slice_that_does_not_sample_is_refused() -> None:
    draft = StepDraft(10)
    draft.schedule(a_state(), 2)
    with pytest.raises(ProtocolError, match="a token comes exactly"):
        validate_result(draft.plan(0), StepResult((SliceResult(R, 5),)))
    validate_result(draft.plan(0), StepResult((SliceResult(R),)))


def test_a_failed_step_answers_every_slice_with_its_error() -> None:
    draft = StepDraft(10)
    draft.schedule(a_state(), 3)
    plan = draft.plan(0)
    failed = StepResult.failed(plan, "it broke")
    validate_result(plan, failed)
    assert failed.results == (SliceResult(R, finish=FinishReason.ERROR, error="it broke"),)


def test_i18_an_error_advances_nothing() -> None:
    state = a_state()
    assert outcome_of(state, SliceResult(R, finish=FinishReason.ERROR, error="x")) is FinishReason.ERROR
    assert (state.num_computed_tokens, state.num_tokens) == (0, 3)


def test_a_chunk_only_advances_the_computed_tokens() -> None:
    state = a_state()
    assert outcome_of(state, SliceResult(R), 2) is None
    assert (state.num_computed_tokens, state.num_tokens) == (2, 3)


def test_a_sampled_token_is_appended_and_reported_with_its_index() -> None:
    state = a_state()
    events: list[Event] = []
    logprob = TokenLogprob(7, -0.5)
    assert apply_result(state, planned(state, 3), SliceResult(R, 7, logprob), events) is None
    assert events == [TokensCommitted(R, 0, 7, logprob)]
    assert (list(state.tokens), state.num_computed_tokens) == ([1, 2, 3, 7], 3)


def test_i28_the_last_allowed_token_ends_with_length_and_not_one_earlier() -> None:
    state = a_state(max_tokens=2)
    assert outcome_of(state, SliceResult(R, 7)) is None
    assert outcome_of(state, SliceResult(R, 7)) is FinishReason.LENGTH


def test_a_stop_token_ends_with_stop_even_at_the_limit() -> None:
    assert outcome_of(a_state(stop_token_ids=[7]), SliceResult(R, 7)) is FinishReason.STOP
    assert outcome_of(a_state(stop_token_ids=[7], max_tokens=1), SliceResult(R, 7)) is FinishReason.STOP
    assert outcome_of(a_state(stop_token_ids=[8]), SliceResult(R, 7)) is None


def test_stop_tokens_do_not_count_before_min_tokens() -> None:
    state = a_state(stop_token_ids=[7], min_tokens=2)
    assert outcome_of(state, SliceResult(R, 7)) is None
    assert outcome_of(state, SliceResult(R, 7)) is FinishReason.STOP


def test_a_stop_string_found_outside_ends_with_stop() -> None:
    assert outcome_of(a_state(min_tokens=2), SliceResult(R, 7, finish=FinishReason.STOP)) is FinishReason.STOP


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (RequestKind.EMBED, FinishReason.STOP),
        (RequestKind.SCORE, FinishReason.LENGTH),
        (RequestKind.GENERATE, FinishReason.LENGTH),
    ],
)
def test_who_samples_nothing_ends_with_the_prompt(kind: RequestKind, reason: FinishReason) -> None:
    state = a_state(kind=kind, max_tokens=0)
    assert outcome_of(state, SliceResult(R), 2) is None
    assert outcome_of(state, SliceResult(R), 1) is reason


def test_the_partial_embedding_is_kept_for_the_next_chunk() -> None:
    state = a_state(kind=RequestKind.EMBED, max_tokens=0)
    outcome_of(state, SliceResult(R, embedding="half"), 2)
    assert planned(state, 1).embedding == "half"
    other = a_state()
    outcome_of(other, SliceResult(R, embedding="nonsense"), 2)
    assert other.embedding is None


def logprobs(*token_ids: int) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token_id, -1.0) for token_id in token_ids)


def test_i27_prompt_positions_are_reported_once_however_often_they_are_computed() -> None:
    state = a_state(prompt_logprobs=True)
    events: list[Event] = []
    apply_result(state, planned(state, 1), SliceResult(R, prompt_logprobs=logprobs(2)), events)
    state.num_computed_tokens = 0  # preempted
    apply_result(state, planned(state, 1), SliceResult(R, prompt_logprobs=logprobs(2)), events)
    state.num_computed_tokens = 0  # and again, this time with room for the whole prompt
    apply_result(state, planned(state, 3), SliceResult(R, 9, prompt_logprobs=logprobs(2, 3)), events)
    assert events[:-1] == [PromptScored(R, 1, logprobs(2)), PromptScored(R, 2, logprobs(3))]
