"""``StepDraft``: budget plus scheduled tokens is constant, and slices say what the runner must know."""

from __future__ import annotations

from scheduler.draft import StepDraft
from scheduler.events import Resumed
from scheduler.request import RequestId, RequestKind, RequestState
from scheduler.testing import make_request


def a_state(name: str = "r", prompt: tuple[int, ...] = (1, 2, 3, 4), **fields: object) -> RequestState:
    return RequestState(make_request(name, prompt, **fields), 0)  # type: ignore[arg-type]


def test_i16_scheduling_takes_from_the_budget_and_withdrawing_gives_back() -> None:
    draft = StepDraft(10)
    first, second = a_state("a"), a_state("b")
    draft.schedule(first, 3)
    draft.schedule(second, 4)
    assert (draft.budget, len(draft)) == (3, 2)
    draft.withdraw(first)
    draft.withdraw(first)
    assert (draft.budget, len(draft)) == (6, 1)
    plan = draft.plan(5)
    assert (plan.step_id, plan.num_tokens, [s.request_id for s in plan.slices]) == (5, 4, ["b"])


def test_a_chunk_of_a_prompt_samples_nothing_and_needs_no_logits() -> None:
    draft = StepDraft(10)
    draft.schedule(a_state(), 3)
    (chunk,) = draft.plan(0).slices
    assert (chunk.start, chunk.num_tokens, chunk.num_logits, chunk.samples, chunk.pools) == (0, 3, 0, False, False)


def test_the_last_chunk_and_every_decode_sample_from_one_row() -> None:
    state = a_state()
    state.num_computed_tokens = 3
    draft = StepDraft(10)
    draft.schedule(state, 1)
    (last,) = draft.plan(0).slices
    assert (last.start, last.num_logits, last.samples, last.num_output_tokens) == (3, 1, True, 0)
    state.tokens.append(9)
    state.num_computed_tokens = 4
    draft.schedule(state, 1)
    (decode,) = draft.plan(1).slices
    assert (decode.start, decode.num_logits, decode.samples, decode.num_output_tokens) == (4, 1, True, 1)
    assert decode.tokens is state.tokens
    assert decode.block_table is state.block_table


def test_a_scored_prompt_needs_logits_for_every_row_of_the_prompt_and_then_for_one() -> None:
    state = a_state(prompt_logprobs=True)
    draft = StepDraft(10)
    draft.schedule(state, 3)
    assert draft.plan(0).slices[0].num_logits == 3
    state.tokens.append(9)
    state.num_computed_tokens = 4
    draft.schedule(state, 1)
    assert draft.plan(0).slices[0].num_logits == 1


def test_score_and_embed_requests_never_sample() -> None:
    draft = StepDraft(10)
    draft.schedule(a_state("s", kind=RequestKind.SCORE, max_tokens=0), 4)
    embed = a_state("e", kind=RequestKind.EMBED, max_tokens=0)
    embed.embedding = "partial"
    draft.schedule(embed, 4)
    scored, pooled = draft.plan(0).slices
    assert (scored.num_logits, scored.samples, scored.pools) == (4, False, False)
    assert (pooled.num_logits, pooled.samples, pooled.pools, pooled.embedding) == (0, False, True, "partial")


def test_a_request_that_may_generate_nothing_computes_its_prompt_and_needs_no_logits() -> None:
    draft = StepDraft(10)
    draft.schedule(a_state("warm", max_tokens=0), 4)
    draft.schedule(a_state("scored", max_tokens=0, prompt_logprobs=True), 4)
    warm, scored = draft.plan(0).slices
    assert (warm.num_tokens, warm.num_logits, warm.samples, warm.pools) == (4, 0, False, False)
    assert (scored.num_logits, scored.samples) == (4, False)


def test_events_of_planning_travel_with_the_plan() -> None:
    draft = StepDraft(1)
    draft.events.append(Resumed(RequestId("r")))
    assert draft.plan(0).events == (Resumed(RequestId("r")),)
