"""``Scheduler`` from outside: entrances, the step, the rules of a plan, endings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from scheduler import (
    AdmissionError,
    Admitted,
    BlockEvicted,
    BlockId,
    DuplicateRequestError,
    Event,
    FCFSPolicy,
    Finished,
    FinishReason,
    MemoryFullError,
    PrefixHit,
    ProtocolError,
    QueueFullError,
    RequestId,
    RequestTooLargeError,
    RequestView,
    Scheduler,
    SchedulerConfig,
    SliceResult,
    StepPlan,
    StepResult,
    TokensCommitted,
    request_bytes,
)
from scheduler.request import RequestKind
from scheduler.testing import Fault, KVHonestRunner, World, make_request

NewWorld = Callable[..., World]


def shares(plan: StepPlan) -> dict[str, tuple[int, int]]:
    """Request id to (start, number of tokens)."""
    return {scheduled.request_id: (scheduled.start, scheduled.num_tokens) for scheduled in plan.slices}


class Driven:
    """A scheduler and its runner, one step at a time, with the plans to look at."""

    def __init__(self, world: World) -> None:
        self.scheduler = world.scheduler
        self.runner = KVHonestRunner(world.config.num_blocks, world.config.block_size)

    def step(self) -> StepPlan:
        plan = self.scheduler.step(0.0)
        self.scheduler.commit(self.runner.run(plan), 0.0)
        return plan


# Entrances


def test_i17_an_id_that_is_live_is_refused_and_free_again_after_the_end(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1]))
    with pytest.raises(DuplicateRequestError, match="'r' is live"):
        world.scheduler.add(make_request("r", [1]), 0.0)
    world.settle()
    assert world.add(make_request("r", [1]))
    world.settle()


@pytest.mark.parametrize(("num_tokens", "fits"), [(11, True), (12, True), (13, False)])
def test_row41_i19_exactly_what_can_never_fit_is_refused(new_world: NewWorld, num_tokens: int, fits: bool) -> None:
    world = new_world(num_blocks=4)
    assert world.add(make_request("r", [1] * (num_tokens - 1), max_tokens=1)) is fits
    world.add(make_request("canary", [1], max_tokens=1))
    world.settle()
    if not fits:
        with pytest.raises(RequestTooLargeError, match="needs 13 tokens of KV cache, one request may") as caught:
            world.scheduler.add(make_request("r", [1], max_tokens=12), 0.0)
        assert (caught.value.num_tokens, caught.value.limit) == (13, 12)


def test_the_queue_has_a_limit(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=1, max_waiting=2)
    world.add(make_request("a", [1]))
    world.add(make_request("b", [1]))
    with pytest.raises(QueueFullError, match="2 requests are already waiting") as caught:
        world.scheduler.add(make_request("c", [1]), 0.0)
    assert caught.value.limit == 2
    world.step()
    assert world.add(make_request("c", [1])), "who runs does not wait"


def test_i31_a_request_whose_structures_have_no_room_is_refused_and_what_ends_makes_room(new_world: NewWorld) -> None:
    size = request_bytes(1, 4, 4)
    world = new_world(budget_bytes=2 * size)
    world.add(make_request("a", [1]))
    world.add(make_request("b", [1]))
    assert world.accountant.stats().by_name == {"requests": 2 * size}
    with pytest.raises(MemoryFullError):
        world.scheduler.add(make_request("c", [1]), 0.0)
    world.finish(RequestId("a"))
    assert world.add(make_request("c", [1]))


def test_i31_what_a_request_needs_besides_is_charged_to_it(new_world: NewWorld) -> None:
    size = request_bytes(1, 4, 4)
    world = new_world(budget_bytes=2 * size)
    with pytest.raises(MemoryFullError):
        world.scheduler.add(make_request("a", [1], extra_bytes=size + 1), 0.0)
    world.add(make_request("a", [1], extra_bytes=size))
    assert world.scheduler.stats().num_reserved_bytes == 2 * size
    world.finish(RequestId("a"))
    assert world.scheduler.stats().num_reserved_bytes == 0


def test_without_an_accountant_only_counts_bound_the_requests() -> None:
    scheduler = Scheduler(SchedulerConfig(num_blocks=4, max_num_seqs=1), FCFSPolicy())
    scheduler.add(make_request("r", [1]), 0.0)
    assert scheduler.stats().num_reserved_bytes == 0
    assert len(scheduler.finish(RequestId("r"), FinishReason.CANCELLED)) == 1
    assert not scheduler.has_work


# Out of turn


def test_step_and_commit_alternate(new_world: NewWorld) -> None:
    scheduler = new_world().scheduler
    with pytest.raises(ProtocolError, match="no step to commit"):
        scheduler.commit(StepResult(()), 0.0)
    scheduler.step(0.0)
    with pytest.raises(ProtocolError, match="step 0 was not committed"):
        scheduler.step(0.0)
    scheduler.commit(StepResult(()), 0.0)
    assert scheduler.step(0.0).step_id == 1


def test_a_wrong_result_changes_nothing_and_the_right_one_is_still_welcome(new_world: NewWorld) -> None:
    scheduler = new_world().scheduler
    scheduler.add(make_request("r", [1]), 0.0)
    scheduler.step(0.0)
    before = scheduler.stats()
    with pytest.raises(ProtocolError):
        scheduler.commit(StepResult(()), 0.0)
    assert scheduler.stats() == before
    events = scheduler.commit(StepResult((SliceResult(RequestId("r"), 5),)), 0.0)
    assert events == (TokensCommitted(RequestId("r"), 0, 5, None),)


def test_a_policy_that_names_a_victim_it_was_not_offered_is_told_so() -> None:
    class Treacherous(FCFSPolicy):
        def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - it knows better
            return oldest

    config = SchedulerConfig(num_blocks=5, block_size=1, max_num_seqs=2)
    world = World(config, Treacherous())
    world.add(make_request("oldest", [1], max_tokens=3))
    oldest = world.scheduler._states[RequestId("oldest")]
    world.add(make_request("second", [2], max_tokens=3))
    with pytest.raises(ProtocolError, match="a victim that it was not offered"):
        world.settle()


def test_a_policy_is_shown_every_event_in_its_order(new_world: NewWorld) -> None:
    class Attentive(FCFSPolicy):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Event] = []

        def observe(self, events: Sequence[Event]) -> None:
            self.seen.extend(events)

    policy = Attentive()
    world = new_world(policy, num_blocks=5, block_size=2, max_num_seqs=2)
    for name in ("old", "young", "gone"):
        world.add(make_request(name, [ord(name[0])] * 2, max_tokens=5))
    world.step()
    world.finish(RequestId("gone"))
    world.settle()
    assert world.reach.counts["preempted"]
    assert policy.seen == world.trace


# The rules of a plan


def test_i16_a_prompt_is_worked_off_in_chunks_of_what_the_budget_leaves(new_world: NewWorld) -> None:
    driven = Driven(new_world(max_num_batched_tokens=8, max_num_seqs=2))
    driven.scheduler.add(make_request("long", [1] * 19), 0.0)
    assert [shares(driven.step())["long"] for _ in range(4)] == [(0, 8), (8, 8), (16, 3), (19, 1)]


def test_the_chunk_limit_bounds_one_request_and_leaves_the_rest_to_others(new_world: NewWorld) -> None:
    driven = Driven(new_world(max_num_batched_tokens=8, max_num_seqs=2, max_prefill_chunk=5))
    driven.scheduler.add(make_request("a", [1] * 9), 0.0)
    driven.scheduler.add(make_request("b", [2] * 9), 0.0)
    assert shares(driven.step()) == {"a": (0, 5), "b": (0, 3)}
    assert shares(driven.step()) == {"a": (5, 4), "b": (3, 4)}


def test_decodes_come_before_prompts_so_that_no_stream_stalls(new_world: NewWorld) -> None:
    driven = Driven(new_world(max_num_batched_tokens=4, max_num_seqs=4))
    driven.scheduler.add(make_request("long", [9] * 40), 0.0)
    driven.step()
    for name in ("a", "b", "c"):
        driven.scheduler.add(make_request(name, [1], max_tokens=30), 0.0)
    # The prompt in progress takes the whole budget, so the short ones start only when it is done ...
    while "a" not in shares(plan := driven.step()):
        assert plan.num_tokens == 4
    # ... but once they decode, a new long prompt gets only what they leave.
    driven.scheduler.finish(RequestId("long"), FinishReason.CANCELLED)
    while driven.scheduler.stats().num_running < 3:
        driven.step()
    driven.scheduler.add(make_request("late", [8] * 40), 0.0)
    for _ in range(12):
        plan = shares(driven.step())
        assert {name: plan[name][1] for name in ("a", "b", "c")} == {"a": 1, "b": 1, "c": 1}
        assert plan["late"][1] == 1


def test_a_prompt_that_lacks_two_tokens_does_not_go_before_a_decode(new_world: NewWorld) -> None:
    class Greedy(FCFSPolicy):
        def grant(self, request: RequestView, budget: int) -> int:
            return 1 if request.num_computed_tokens == 0 else budget

    driven = Driven(new_world(Greedy(), max_num_seqs=2, max_num_batched_tokens=2))
    driven.scheduler.add(make_request("prompt", [1] * 3), 0.0)
    driven.scheduler.add(make_request("decode", [2]), 0.0)
    driven.step()
    assert shares(driven.step()) == {"decode": (1, 1), "prompt": (1, 1)}


def test_i13_a_cached_block_that_is_used_for_something_else_is_reported(new_world: NewWorld) -> None:
    world = new_world(num_blocks=4, max_num_seqs=1)
    world.add(make_request("first", [1] * 9, max_tokens=1))
    while world.scheduler.has_work:
        world.step()
    world.add(make_request("second", [2] * 8, max_tokens=1))
    evicted = [event for event in world.step() if isinstance(event, BlockEvicted)]
    assert evicted == [BlockEvicted(BlockId(2))], "the tail of the first prompt; its head is still findable"
    world.settle()


def test_i16_no_more_requests_run_than_there_are_seats(new_world: NewWorld) -> None:
    driven = Driven(new_world(max_num_seqs=2))
    for name in ("a", "b", "c"):
        driven.scheduler.add(make_request(name, [1]), 0.0)
    assert set(shares(driven.step())) == {"a", "b"}


def test_who_does_not_fit_ends_the_round_and_is_not_slipped_past(new_world: NewWorld) -> None:
    world = new_world(num_blocks=7, block_size=1)
    driven = Driven(world)
    driven.scheduler.add(make_request("running", [1, 1, 1], max_tokens=2), 0.0)
    driven.step()
    driven.scheduler.add(make_request("big", [2, 2, 2], max_tokens=1), 0.0)
    driven.scheduler.add(make_request("small", [3], max_tokens=1), 0.0)
    assert set(shares(driven.step())) == {"running"}
    assert set(shares(driven.step())) == {"big", "small"}


def test_admission_leaves_blocks_that_running_prompts_still_need(new_world: NewWorld) -> None:
    driven = Driven(
        new_world(num_blocks=9, block_size=1, max_num_seqs=2, max_num_batched_tokens=6, max_prefill_chunk=2)
    )
    driven.scheduler.add(make_request("long", [1] * 6, max_tokens=1), 0.0)
    driven.scheduler.add(make_request("other", [2, 2], max_tokens=1), 0.0)
    # Three blocks would do for the other, and six are free: but four of them are the long prompt's.
    assert [set(shares(driven.step())) for _ in range(4)] == [{"long"}, {"long"}, {"long"}, {"other"}]


def test_a_policy_that_grants_everything_to_one_prompt_lets_the_others_wait_a_step(new_world: NewWorld) -> None:
    class Greedy(FCFSPolicy):
        def grant(self, request: RequestView, budget: int) -> int:
            return 1 if request.num_computed_tokens == 0 else budget

    driven = Driven(new_world(Greedy(), max_num_seqs=3, max_num_batched_tokens=6))
    for token_id, name in enumerate(("a", "b", "c"), start=1):
        driven.scheduler.add(make_request(name, [token_id] * 9, max_tokens=1), 0.0)
    assert shares(driven.step()) == {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    assert shares(driven.step()) == {"a": (1, 6)}
    assert shares(driven.step()) == {"a": (7, 2), "b": (1, 4)}


def test_i11_a_second_equal_prompt_starts_behind_its_cached_prefix(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("first", [1] * 9))
    while world.scheduler.has_work:
        world.step()
    world.add(make_request("second", [1] * 9))
    events = world.step()
    assert PrefixHit(RequestId("second"), 9, 8, first=True) in events
    while world.scheduler.has_work:
        events = world.step()
    (end,) = (event for event in events if isinstance(event, Finished))
    assert end.num_cached_tokens == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": RequestKind.SCORE, "max_tokens": 0},
        {"kind": RequestKind.EMBED, "max_tokens": 0},
        {"prompt_logprobs": True},
    ],
)
def test_requests_that_need_every_row_skip_the_prefix_look_up(new_world: NewWorld, fields: dict[str, object]) -> None:
    world = new_world()
    world.add(make_request("first", [1] * 9))
    while world.scheduler.has_work:
        world.step()
    world.add(make_request("second", [1] * 9, **fields))  # type: ignore[arg-type]
    assert PrefixHit(RequestId("second"), 9, 0, first=True) in world.step()
    world.settle()


def test_score_and_embed_requests_publish_what_they_computed(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("score", [1] * 9, kind=RequestKind.SCORE, max_tokens=0))
    world.step()
    world.add(make_request("second", [1] * 9))
    assert PrefixHit(RequestId("second"), 9, 8, first=True) in world.step()
    world.settle()


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_request_that_may_generate_nothing_warms_the_prefix_cache(new_world: NewWorld, chunk: int | None) -> None:
    world = new_world(max_prefill_chunk=chunk)
    world.add(make_request("warm", [1] * 9, max_tokens=0))
    while world.scheduler.has_work:
        world.step()
    warm = world.histories[RequestId("warm")].finished
    assert warm == Finished(RequestId("warm"), FinishReason.LENGTH, 0, 0)
    world.add(make_request("second", [1] * 9))
    assert PrefixHit(RequestId("second"), 9, 8, first=True) in world.step()
    world.settle()


def test_a_warm_prompt_is_warmed_again_for_the_price_of_its_last_block(new_world: NewWorld) -> None:
    world = new_world()
    for name in ("first", "again"):
        world.add(make_request(name, [1] * 8, max_tokens=0))
        while world.scheduler.has_work:
            world.step()
    again = world.histories[RequestId("again")].finished
    assert again == Finished(RequestId("again"), FinishReason.LENGTH, 0, 4)


def test_a_prompt_without_output_may_fill_the_whole_limit(new_world: NewWorld) -> None:
    world = new_world(num_blocks=4, max_num_batched_tokens=16)
    world.add(make_request("whole", [1] * 12, max_tokens=0))
    world.settle()
    assert not world.add(make_request("too large", [1] * 13, max_tokens=0))


def test_an_idle_step_is_empty_and_harmless(new_world: NewWorld) -> None:
    world = new_world()
    assert world.step() == ()
    assert world.scheduler.stats().num_steps == 1


# Endings


def test_admission_tells_how_long_the_request_waited(new_world: NewWorld) -> None:
    world = new_world()
    world.clock.advance(5.0)
    world.add(make_request("r", [1, 2], arrival_s=2.0))
    world.add(make_request("from the future", [1, 2], arrival_s=9.0))
    admitted = [event for event in world.step() if isinstance(event, Admitted)]
    assert admitted == [Admitted(RequestId("r"), 2, 3.0), Admitted(RequestId("from the future"), 2, 0.0)]
    world.settle()


@pytest.mark.parametrize("late_by", [0.0, 1.0])
def test_a_request_ends_at_its_deadline_and_not_before(new_world: NewWorld, late_by: float) -> None:
    world = new_world(max_num_seqs=1)
    world.add(make_request("running", [1], max_tokens=20, deadline_s=2.0))
    world.add(make_request("waiting", [1], max_tokens=20, deadline_s=3.0))
    world.add(make_request("patient", [1], max_tokens=1))
    world.clock.advance(1.9)
    world.step()
    assert len(world.live) == 3
    world.clock.advance_to(2.0 + late_by)
    world.step()
    ended = {r: h.finished.reason for r, h in world.histories.items() if h.finished}
    assert ended["running"] is FinishReason.DEADLINE  # type: ignore[index]
    assert ("waiting" in ended) is (late_by == 1.0)
    world.settle()


def test_deadlines_strike_in_order_even_after_most_requests_ended_early(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=1, max_waiting=1000)
    deadlines = {f"r{index}": float((index * 37) % 211) for index in range(200)}
    for name, deadline_s in deadlines.items():
        world.scheduler.add(make_request(name, [1], max_tokens=90, deadline_s=1000 + deadline_s), 0.0)
    staying = set(list(deadlines)[::5])
    for name in deadlines.keys() - staying:
        world.scheduler.finish(RequestId(name), FinishReason.CANCELLED)
    for name in sorted(staying, key=deadlines.__getitem__):
        before = world.scheduler.step(1000 + deadlines[name] - 0.5)
        world.scheduler.commit(world.runner.run(before), 0.0)
        at = world.scheduler.step(1000 + deadlines[name])
        assert [event.request_id for event in at.events if isinstance(event, Finished)] == [name]
        world.scheduler.commit(world.runner.run(at), 0.0)


def test_a_request_that_ended_in_time_does_not_end_again_at_its_deadline(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1], max_tokens=1, deadline_s=5.0))
    world.settle()
    world.clock.advance(10.0)
    assert world.step() == ()


def test_an_error_from_outside_carries_its_text(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1]))
    (end,) = world.scheduler.finish(RequestId("r"), FinishReason.ERROR, error="grammar went wrong")
    assert end == Finished(RequestId("r"), FinishReason.ERROR, 0, 0, error="grammar went wrong")


def test_an_embedding_travels_only_with_a_good_end(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=8)
    world.add(make_request("good", [1] * 4, kind=RequestKind.EMBED, max_tokens=0))
    world.add(make_request("cut", [2] * 10, kind=RequestKind.EMBED, max_tokens=0))
    world.step()
    world.finish(RequestId("cut"))
    assert world.histories[RequestId("good")].finished.embedding is not None  # type: ignore[union-attr]
    assert world.histories[RequestId("cut")].finished.embedding is None  # type: ignore[union-attr]


def test_stats_tell_where_everybody_is(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2, num_blocks=10)
    prompt = [1] * 9
    world.add(make_request("leader", prompt))
    world.add(make_request("follower", prompt))
    world.add(make_request("other", [2] * 5))
    world.add(make_request("queued", [3]))
    plan = world.scheduler.step(0.0)
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_set_aside, stats.num_preempted) == (2, 2, 1, 0)
    assert (stats.num_blocks, stats.num_used_blocks, stats.num_pledged_blocks) == (9, 5, 0)
    world.scheduler.commit(world.runner.run(plan), 0.0)
    stats = world.scheduler.stats()
    assert (stats.num_cached_blocks, stats.num_steps) == (3, 1)


def test_i15_the_prefix_cache_is_reset_only_when_nobody_holds_a_block(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1] * 9))
    world.step()
    assert not world.scheduler.reset_prefix_cache()
    assert world.scheduler.stats().num_cached_blocks == 2
    world.settle()


def test_prefixes_that_nobody_holds_can_be_dropped_at_any_time(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("gone", [1] * 9))
    world.step()
    world.finish(RequestId("gone"))
    world.add(make_request("here", [2] * 9))
    world.step()
    assert world.scheduler.stats().num_cached_blocks == 4
    assert world.drop_unheld_prefixes() == 2
    assert world.scheduler.stats().num_cached_blocks == 2
    world.settle()


def test_stopping_by_a_stop_string_reports_the_token_that_ended_it(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1]))
    events = world.step({RequestId("r"): Fault.STOP_STRING})
    assert [type(event) for event in events[-2:]] == [TokensCommitted, Finished]
    assert world.histories[RequestId("r")].finished.reason is FinishReason.STOP  # type: ignore[union-attr]


def test_every_refusal_is_an_admission_error() -> None:
    for refusal in (DuplicateRequestError, RequestTooLargeError, QueueFullError, MemoryFullError):
        assert issubclass(refusal, AdmissionError)
