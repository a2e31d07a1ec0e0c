"""Equal prompts are computed once, and nobody waits for a prefix that nobody will publish."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler import RequestId, StepPlan
from scheduler.testing import Fault, World, make_request

NewWorld = Callable[..., World]


def settle_and_count(world: World) -> int:
    """Prompt tokens computed until everybody ended."""
    num_prompt_tokens = 0
    while world.scheduler.has_work:
        plan: StepPlan = world.scheduler.step(world.clock())
        for scheduled in plan.slices:
            prompt_end = len(scheduled.tokens) - scheduled.num_output_tokens
            num_prompt_tokens += max(0, min(scheduled.start + scheduled.num_tokens, prompt_end) - scheduled.start)
        world.scheduler.commit(world.runner.run(plan), world.clock())
    return num_prompt_tokens


@pytest.mark.parametrize("num_siblings", [2, 5, 16])
@pytest.mark.parametrize("num_batched_tokens", [16, 512])
@pytest.mark.parametrize("num_prompt_tokens", [41, 42, 44])
def test_n_siblings_compute_their_common_prompt_once(
    new_world: NewWorld, num_siblings: int, num_batched_tokens: int, num_prompt_tokens: int
) -> None:
    world = new_world(max_num_seqs=16, max_num_batched_tokens=num_batched_tokens)
    for index in range(num_siblings):
        world.add(make_request(f"choice{index}", [1] * num_prompt_tokens, max_tokens=2))
    # Ten full blocks are shared; what follows, at least the last token, each sibling computes for itself.
    assert settle_and_count(world) == num_prompt_tokens + (num_prompt_tokens - 40) * (num_siblings - 1)


def test_without_prefix_caching_each_sibling_computes_its_own(new_world: NewWorld) -> None:
    world = new_world(enable_prefix_caching=False)
    for index in range(3):
        world.add(make_request(f"choice{index}", [1] * 42, max_tokens=2))
    assert settle_and_count(world) == 3 * 42


def test_a_common_system_prompt_is_computed_once(new_world: NewWorld) -> None:
    world = new_world()
    for index in range(5):
        world.add(make_request(f"user{index}", [1] * 40 + [index + 2] * 5, max_tokens=2))
    assert settle_and_count(world) == 40 + 5 * 5


def test_i12_tenants_share_nothing(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("a", [1] * 20, tenant="a"))
    world.add(make_request("b", [1] * 20, tenant="b"))
    world.add(make_request("salted", [1] * 20, tenant="a", cache_salt="s"))
    assert settle_and_count(world) == 60


def test_waiters_go_on_as_soon_as_the_block_they_share_is_published(new_world: NewWorld) -> None:
    world = new_world(max_prefill_chunk=8)
    world.add(make_request("leader", [1] * 24 + [2] * 17, max_tokens=50))
    world.add(make_request("waiter", [1] * 24 + [3] * 2, max_tokens=1))
    for _ in range(3):
        assert "waiter" in world.live
        world.step()
    assert world.scheduler.stats().num_set_aside == 0, "24 tokens of the leader's prompt are computed"
    world.step()
    assert world.live == ["leader"]
    world.settle()


def test_waiters_go_on_when_their_leader_is_cancelled(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=20, max_prefill_chunk=8)
    world.add(make_request("leader", [1] * 30))
    world.add(make_request("waiter", [1] * 30))
    world.step()
    assert world.scheduler.stats().num_set_aside == 1
    world.finish(RequestId("leader"))
    assert world.scheduler.stats().num_set_aside == 0
    world.settle()


def test_waiters_go_on_when_their_leader_fails_and_find_nothing_of_it(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=20, max_prefill_chunk=8)
    world.add(make_request("leader", [1] * 30))
    world.add(make_request("waiter", [1] * 30))
    world.step()
    world.step({RequestId("leader"): Fault.NOT_FINITE})
    assert world.scheduler.stats().num_cached_blocks == 0
    world.settle()


def test_waiters_go_on_when_their_leader_lost_the_race_to_publish(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("first", [1] * 5, max_tokens=1))
    world.step()
    # It computes the first block again, cannot publish it, and so will never publish the second.
    world.add(make_request("scored", [1] * 9, max_tokens=50, prompt_logprobs=True))
    world.add(make_request("waiter", [1] * 9, max_tokens=1))
    for _ in range(3):
        world.step()
    assert "waiter" not in world.live
    world.settle()


def test_waiters_go_on_when_their_leader_is_preempted(new_world: NewWorld) -> None:
    world = new_world(num_blocks=12, block_size=2, max_num_seqs=3, max_num_batched_tokens=3, max_prefill_chunk=1)
    world.add(make_request("old", [2] * 3, max_tokens=16))
    for _ in range(4):
        world.step()
    world.add(make_request("leader", [1] * 12, max_tokens=4))
    world.add(make_request("waiter", [1] * 12, max_tokens=4))
    while world.scheduler.has_work:
        world.step()
    world.settle()


def test_one_step_sets_aside_no_more_requests_than_it_has_seats(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=3, max_num_batched_tokens=20, max_prefill_chunk=8)
    for index in range(20):
        world.add(make_request(f"r{index}", [1] * 30))
    world.step()
    assert world.scheduler.stats().num_set_aside == 3
    world.settle()


def test_who_waits_for_a_prefix_can_leave(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=20, max_prefill_chunk=8)
    for name in ("leader", "one", "two"):
        world.add(make_request(name, [1] * 30))
    world.step()
    world.finish(RequestId("one"))
    assert world.scheduler.stats().num_set_aside == 1
    world.settle()
