"""The kit's own oracle must notice mistakes, or the laws prove nothing."""

from __future__ import annotations

import pytest

from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan
from scheduler.request import BlockId, RequestId, RequestKind
from scheduler.testing import Fault, HonestModel, KVHonestRunner, StepCrash, make_request, reference_output

MODEL = HonestModel()


def a_slice(
    tokens: list[int], start: int, num_tokens: int, table: list[int], *, name: str = "r", **fields: object
) -> ScheduledSlice:
    blocks = [BlockId(block) for block in table]
    known: dict[str, object] = {"num_logits": 0, "samples": False, "num_output_tokens": 0, **fields}
    return ScheduledSlice(RequestId(name), start, num_tokens, tokens, blocks, **known)  # type: ignore[arg-type]


def run(runner: KVHonestRunner, *slices: ScheduledSlice, **kwargs: object) -> tuple[SliceResult, ...]:
    return runner.run(StepPlan(0, slices, ()), **kwargs).results  # type: ignore[arg-type]


def sampled(runner: KVHonestRunner, tokens: list[int], start: int, table: list[int]) -> SliceResult:
    (result,) = run(runner, a_slice(tokens, start, len(tokens) - start, table, num_logits=1, samples=True))
    return result


def test_the_token_depends_on_what_the_cache_holds_and_not_on_what_the_plan_says() -> None:
    tokens = [1, 2, 2, 1, 2]
    whole = sampled(KVHonestRunner(8, 2), tokens, 0, [1, 2, 3])
    assert whole.token_id == MODEL.next_token(tokens)
    runner = KVHonestRunner(8, 2)
    run(runner, a_slice(tokens, 0, 3, [5, 6]))
    assert sampled(runner, tokens, 3, [5, 6, 7]) == whole, "chunks change nothing"
    for wrong_table in ([5, 4, 7], [6, 5, 7]):
        assert sampled(runner, tokens, 4, wrong_table).logprob != whole.logprob


def test_a_block_shared_by_mistake_is_noticed_in_the_same_step() -> None:
    runner = KVHonestRunner(8, 2)
    one = a_slice([1, 1], 0, 2, [1], num_logits=1, samples=True, name="one")
    two = a_slice([2, 2], 0, 2, [1], num_logits=1, samples=True, name="two")
    first, second = run(runner, one, two)
    assert first.logprob != MODEL.logprob([1, 1], MODEL.next_token([1, 1]))
    assert second.logprob == MODEL.logprob([2, 2], MODEL.next_token([2, 2]))


def test_a_crash_leaves_some_slots_written_and_returns_nothing() -> None:
    runner = KVHonestRunner(8, 2)
    slices = [a_slice([1], 0, 1, [block], name=f"r{block}") for block in (1, 2)]
    with pytest.raises(StepCrash):
        run(runner, *slices, crash_after=1)
    assert (runner.gather([BlockId(1)], 1), runner.gather([BlockId(2)], 1)) == ([1], [-1])


def test_numbers_that_are_not_finite_poison_the_slots_and_fail_the_request() -> None:
    runner = KVHonestRunner(8, 2)
    (result,) = run(runner, a_slice([1, 1], 0, 2, [1]), faults={RequestId("r"): Fault.NOT_FINITE})
    assert (result.finish, result.error) == (FinishReason.ERROR, "logits are not finite")
    assert runner.gather([BlockId(1)], 2) == [-2, -2]


def test_a_stop_string_ends_only_where_a_token_is_sampled() -> None:
    faults = {RequestId("r"): Fault.STOP_STRING}
    (chunk,) = run(KVHonestRunner(8, 2), a_slice([1, 1], 0, 1, [1]), faults=faults)
    (last,) = run(KVHonestRunner(8, 2), a_slice([1], 0, 1, [1], num_logits=1, samples=True), faults=faults)
    assert (chunk.finish, last.finish) == (None, FinishReason.STOP)


def test_the_reference_stops_where_the_rule_says() -> None:
    free = reference_output(MODEL, make_request("r", [1, 2], max_tokens=60))
    assert (len(free.token_ids), free.reason) == (60, FinishReason.LENGTH)
    first_end = free.token_ids.index(0)
    stopped = reference_output(MODEL, make_request("r", [1, 2], max_tokens=60, stop_token_ids=[0]))
    assert (stopped.token_ids, stopped.reason) == (free.token_ids[: first_end + 1], FinishReason.STOP)
    later = reference_output(
        MODEL, make_request("r", [1, 2], max_tokens=60, stop_token_ids=[0], min_tokens=first_end + 2)
    )
    assert len(later.token_ids) > first_end + 1


def test_the_reference_scores_and_embeds_whole_prompts() -> None:
    score = reference_output(MODEL, make_request("r", [1, 2, 1], max_tokens=0, kind=RequestKind.SCORE))
    assert [logprob.token_id for logprob in score.prompt_logprobs] == [2, 1]
    embed = reference_output(MODEL, make_request("r", [1, 2, 1], max_tokens=0, kind=RequestKind.EMBED))
    assert isinstance(embed.embedding, int)
    assert (embed.token_ids, embed.prompt_logprobs, score.embedding) == ((), (), None)
