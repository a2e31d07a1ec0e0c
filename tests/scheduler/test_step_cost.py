"""A step costs what it schedules, not what waits. Counted in function calls, so that no timer is involved."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from scheduler import FCFSPolicy, FinishReason, Policy, PriorityPolicy, RequestId
from scheduler.testing import World, make_request

NewWorld = Callable[..., World]


def calls_of(function: Callable[[], object]) -> int:
    """How many function calls, built-in ones included, ``function`` makes."""
    count = 0

    def profiler(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # others may have hung callbacks on the collector
    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def one_step(world: World) -> None:
    plan = world.scheduler.step(0.0)
    world.scheduler.commit(world.runner.run(plan), 0.0)


def busy_world(new_world: NewWorld, policy: Policy, num_waiting: int, *, equal_prompts: bool = False) -> World:
    """All seats taken by long requests, and a queue."""
    world = new_world(policy, num_blocks=2000, max_num_seqs=8, max_waiting=20_000, max_num_batched_tokens=64)
    for index in range(8):
        world.scheduler.add(make_request(f"running{index}", [index + 1] * 4, max_tokens=500), 0.0)
    for _ in range(3):
        one_step(world)
    assert world.scheduler.stats().num_running == 8
    for index in range(num_waiting):
        token_id = 9 if equal_prompts else 10 + index
        world.scheduler.add(make_request(f"waiting{index}", [token_id] * 40, priority=index % 5), 0.0)
    one_step(world)
    return world


@pytest.mark.parametrize("new_policy", [FCFSPolicy, PriorityPolicy])
def test_a_step_costs_the_same_whether_a_hundred_or_ten_thousand_wait(
    new_world: NewWorld, new_policy: Callable[[], Policy]
) -> None:
    few, many = (busy_world(new_world, new_policy(), n) for n in (100, 10_000))
    assert calls_of(lambda: one_step(few)) == calls_of(lambda: one_step(many))


@pytest.mark.parametrize("equal_prompts", [False, True])
def test_filling_a_seat_costs_the_same_whether_a_hundred_or_ten_thousand_wait(
    new_world: NewWorld, equal_prompts: bool
) -> None:
    def fill(num_waiting: int) -> int:
        world = busy_world(new_world, FCFSPolicy(), num_waiting, equal_prompts=equal_prompts)
        for index in range(2):
            world.scheduler.finish(RequestId(f"running{index}"), FinishReason.CANCELLED)
        return calls_of(lambda: one_step(world))

    few, many = fill(100), fill(10_000)
    assert many <= 1.2 * few, "a heap may be a few levels deeper, not more"


def test_the_cost_of_a_step_grows_with_what_runs(new_world: NewWorld) -> None:
    world = busy_world(new_world, FCFSPolicy(), 0)
    eight = calls_of(lambda: one_step(world))
    for index in range(4):
        world.scheduler.finish(RequestId(f"running{index}"), FinishReason.CANCELLED)
    assert calls_of(lambda: one_step(world)) < 0.7 * eight


def test_cancelling_in_a_long_queue_does_not_walk_over_it(new_world: NewWorld) -> None:
    def cancel(num_waiting: int) -> int:
        world = busy_world(new_world, FCFSPolicy(), num_waiting)
        return calls_of(lambda: world.scheduler.finish(RequestId("waiting50"), FinishReason.CANCELLED))

    assert cancel(100) == cancel(10_000)
