"""Rows of the table of faults that end at the scheduler, by number."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from random import Random

import pytest

from scheduler import FCFSPolicy, FinishReason, RequestId, SchedulerConfig
from scheduler.accountant import request_bytes
from scheduler.request import RequestState
from scheduler.testing import Fault, World, four_bit_digest, make_request
from scheduler.testing.storm import stormy_request

NewWorld = Callable[..., World]
R = RequestId("r")


def test_row8_i9_a_hash_that_always_collides_costs_hits_and_no_answers() -> None:
    config = SchedulerConfig(num_blocks=40, block_size=1, max_num_seqs=4)
    world = World(config, FCFSPolicy(), hash_function=four_bit_digest)
    for index in range(30):
        world.add(make_request(f"r{index}", [1 + index % 2, 2 - index % 2] * (1 + index % 3)))
    world.settle()


def in_every_state(new_world: NewWorld) -> list[tuple[str, World]]:
    """Worlds in which ``R`` is in each state that a request can be in."""
    worlds = {name: new_world(max_num_seqs=1) for name in ("unknown", "waiting", "prompt", "answer", "finished")}
    for name in ("waiting", "prompt", "answer", "finished"):
        worlds[name] = world = new_world(max_num_seqs=1, max_num_batched_tokens=4)
        if name == "waiting":
            world.add(make_request("other", [1] * 3))
            world.step()
        world.add(make_request("r", [1] * 6, max_tokens=3))
        for _ in range({"waiting": 1, "prompt": 1, "answer": 3, "finished": 9}[name]):
            world.step()
    worlds["set aside"] = world = new_world(max_num_batched_tokens=20, max_prefill_chunk=8)
    world.add(make_request("leader", [1] * 30))
    world.add(make_request("r", [1] * 30))
    world.step()
    assert world.scheduler.stats().num_set_aside == 1
    worlds["preempted"] = world = new_world(num_blocks=5, block_size=2, max_num_seqs=2)
    world.add(make_request("old", [1, 1], max_tokens=5))
    world.add(make_request("r", [2, 2], max_tokens=5))
    while not world.scheduler.stats().num_preempted:
        world.step()
    return list(worlds.items())


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_row33_i24_a_request_can_be_ended_in_every_state_twice_and_unknown(
    new_world: NewWorld, reason: FinishReason
) -> None:
    for state, world in in_every_state(new_world):
        live = R in world.live
        assert live is (state not in ("unknown", "finished")), state
        assert len(world.finish(R, reason)) == int(live), state
        assert world.finish(R, reason) == (), state
        world.settle()


@pytest.mark.parametrize(("last_token", "fault"), list(product([False, True], [None, *Fault])))
def test_row34_i24_an_end_between_run_and_commit_wins_whatever_the_result_says(
    new_world: NewWorld, last_token: bool, fault: Fault | None
) -> None:
    world = new_world()
    world.add(make_request("r", [1], max_tokens=1 if last_token else 5))
    world.step({R: fault} if fault else None, finish_in_flight=[R])
    assert world.histories[R].finished.reason is FinishReason.CANCELLED  # type: ignore[union-attr]
    world.settle()


def test_row34_an_id_may_be_used_again_before_the_plan_that_names_it_is_committed(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("r", [1, 2, 3]))
    plan = world.scheduler.step(0.0)
    world.finish(R)
    world.add(make_request("r", [1, 2]))
    assert world.scheduler.commit(world.runner.run(plan), 0.0) == ()
    world.settle()


def test_row36_a_step_that_raises_ends_its_requests_and_no_others(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2)
    for token_id, name in enumerate(("a", "b", "waiting"), start=1):
        world.add(make_request(name, [token_id] * 6))
    world.step(crash_after=1)
    reasons = {name: h.finished.reason for name, h in world.histories.items() if h.finished}
    assert set(reasons.values()) == {FinishReason.ERROR}
    assert world.scheduler.stats().num_used_blocks == world.scheduler.stats().num_cached_blocks == 0
    assert "waiting" in world.live
    world.settle()


def test_row40_i14_a_request_with_numbers_that_are_not_finite_fails_alone_and_its_blocks_leave_the_cache(
    new_world: NewWorld,
) -> None:
    world = new_world()
    world.add(make_request("bad", [1] * 9))
    world.add(make_request("good", [2] * 9))
    world.step()
    assert world.scheduler.stats().num_cached_blocks == 4
    world.step({RequestId("bad"): Fault.NOT_FINITE})
    assert world.scheduler.stats().num_cached_blocks == 2
    world.add(make_request("again", [1] * 9))
    world.settle()
    finished = world.histories[RequestId("again")].finished
    assert finished is not None
    assert finished.num_cached_tokens == 0


@pytest.mark.parametrize("how", ["cancelled", "crashed"])
def test_row45_i10_what_a_forgotten_step_wrote_is_never_found(new_world: NewWorld, how: str) -> None:
    world = new_world()
    world.add(make_request("first", [1] * 9))
    if how == "cancelled":
        world.step(finish_in_flight=[RequestId("first")])
    else:
        world.step(crash_after=0)
    assert world.scheduler.stats().num_cached_blocks == 0
    world.add(make_request("second", [1] * 9))
    world.settle()
    finished = world.histories[RequestId("second")].finished
    assert finished is not None
    assert finished.num_cached_tokens == 0


def test_row46_i8_whichever_block_allocation_fails_first_everybody_ends_right(new_world: NewWorld) -> None:
    for num_blocks in range(6, 30):  # a pool of so many usable blocks refuses the allocation after them
        world = new_world(num_blocks=num_blocks, block_size=2, max_num_seqs=4)
        for index in range(6):
            assert world.add(make_request(f"r{index}", [1 + index % 3] * (index + 1), max_tokens=4))
        world.settle()
        assert world.add(make_request("canary", [1, 2]))
        world.settle()


def test_row46_i8_whichever_reservation_fails_first_only_that_request_is_refused(new_world: NewWorld) -> None:
    size = request_bytes(1, 4, 4)
    for fail_kth in range(5):
        world = new_world(budget_bytes=fail_kth * size)
        accepted = [world.add(make_request(f"r{index}", [1])) for index in range(5)]
        assert accepted == [True] * fail_kth + [False] * (5 - fail_kth)
        world.settle()
        assert world.add(make_request("canary", [1])) is (fail_kth > 0)
        world.settle()


def count_live_states() -> int:
    gc.collect()
    return sum(type(thing) is RequestState for thing in gc.get_objects())


def play_mixed(world: World, random: Random, num_requests: int) -> None:
    """Requests come and go without being remembered by the test; three in ten are cancelled."""
    scheduler, live = world.scheduler, []
    for index in range(num_requests):
        request = stormy_request(random, f"r{index}", 0.0, world.config.max_tokens_per_request - 1)
        if request.max_total_tokens <= world.config.max_tokens_per_request:
            scheduler.add(request, 0.0)
            live.append(request.id)
        if random.random() < 0.3 and live:
            scheduler.finish(live.pop(random.randrange(len(live))), FinishReason.CANCELLED)
        while scheduler.stats().num_waiting > 20:
            plan = scheduler.step(0.0)
            scheduler.commit(world.runner.run(plan), 0.0)
    while scheduler.has_work:
        plan = scheduler.step(0.0)
        scheduler.commit(world.runner.run(plan), 0.0)


@pytest.mark.slow
def test_row47_i29_nothing_is_left_of_ten_thousand_mixed_requests(new_world: NewWorld) -> None:
    before = count_live_states()
    world = new_world(num_blocks=14, block_size=2, max_num_seqs=6)
    play_mixed(world, Random(0), 10_000)
    stats = world.scheduler.stats()
    assert (stats.num_used_blocks, stats.num_pledged_blocks, stats.num_preempted, stats.num_set_aside) == (0, 0, 0, 0)
    assert world.accountant.stats().reserved_bytes == 0
    assert count_live_states() - before <= 200, "ended requests linger in some queue"


def test_i29_a_far_deadline_does_not_keep_an_ended_request_in_memory(new_world: NewWorld) -> None:
    before = count_live_states()
    world = new_world()
    for index in range(300):
        world.scheduler.add(make_request(f"r{index}", [1], max_tokens=1, deadline_s=1e9), 0.0)
        world.scheduler.commit(world.runner.run(world.scheduler.step(0.0)), 0.0)
    assert count_live_states() - before <= 140


def test_row64_a_clock_that_jumps_changes_no_output(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2)
    for index in range(4):
        world.scheduler.add(make_request(f"r{index}", [1 + index]), 0.0)
    now = 0.0
    ended = 0
    for jump in [0.0, 3600.0, -7200.0, 3600.0] * 10:
        now += jump
        plan = world.scheduler.step(now)
        events = world.scheduler.commit(world.runner.run(plan), now)
        ended += sum(type(event).__name__ == "Finished" for event in events)
    assert ended == 4


def test_row72_i30_the_same_moves_give_the_same_events(new_world: NewWorld) -> None:
    def play() -> list[object]:
        world = new_world(num_blocks=8, block_size=2, max_num_seqs=4)
        for index in range(12):
            world.add(make_request(f"r{index}", [1 + index % 2] * (1 + index % 5)))
        world.settle()
        return list(world.trace)

    assert play() == play()
