"""I23: no waiting request is overtaken by more than ``max_overtakes`` later arrivals, whatever the policy wants."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler import PriorityPolicy, RequestId
from scheduler.events import Admitted
from scheduler.testing import StarvingPolicy, World, make_request

NewWorld = Callable[..., World]


def order_of_starts(world: World) -> list[str]:
    return [event.request_id for event in world.trace if isinstance(event, Admitted)]


@pytest.mark.parametrize("max_overtakes", [0, 1, 5])
def test_row44_i23_a_long_prompt_starts_although_urgent_requests_never_stop_coming(
    new_world: NewWorld, max_overtakes: int
) -> None:
    world = new_world(PriorityPolicy(), max_num_seqs=1, max_overtakes=max_overtakes)
    world.add(make_request("first", [1], max_tokens=1))
    world.step()
    world.add(make_request("long", [9] * 40, priority=9))
    for index in range(20):
        world.add(make_request(f"urgent{index}", [1], max_tokens=1, priority=-9))
        world.step()
    world.settle()
    assert order_of_starts(world).index("long") == 1 + max_overtakes


def test_row44_i23_one_tenant_cannot_starve_another(new_world: NewWorld) -> None:
    world = new_world(StarvingPolicy(), max_num_seqs=2, max_overtakes=4)
    world.add(make_request("poor", [1], tenant="poor"))
    for index in range(40):
        world.add(make_request(f"rich{index}", [2], tenant="rich", max_tokens=1))
    world.settle()
    assert order_of_starts(world).index("poor") <= 4


def test_i23_the_bound_holds_for_those_behind_the_head_when_others_give_up(new_world: NewWorld) -> None:
    world = new_world(StarvingPolicy(), max_num_seqs=1, max_overtakes=1)
    world.add(make_request("running", [1], max_tokens=20))
    world.step()
    for index in range(4):
        world.add(make_request(f"gone{index}", [1]))
    world.add(make_request("head", [1]))
    for index in range(4):
        world.finish(RequestId(f"gone{index}"))
    world.add(make_request("second", [1]))
    for index in range(8):
        world.add(make_request(f"new{index}", [1]))
    world.settle()
    assert {"head", "second"} <= set(order_of_starts(world)[:4])


def test_i23_an_aged_request_is_not_set_aside_for_an_equal_prefix(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2, max_overtakes=0, max_num_batched_tokens=4)
    world.add(make_request("leader", [1] * 20))
    world.add(make_request("equal", [1] * 20))
    while world.scheduler.has_work:
        world.step()
        assert world.scheduler.stats().num_set_aside == 0
    world.settle()


def test_an_aged_request_that_does_not_fit_is_waited_for(new_world: NewWorld) -> None:
    world = new_world(StarvingPolicy(), num_blocks=8, block_size=1, max_num_seqs=4, max_overtakes=1)
    world.add(make_request("running", [1, 1, 1], max_tokens=4))
    world.step()
    world.add(make_request("big", [2, 2, 2, 2, 2], max_tokens=1))
    for index in range(6):
        world.add(make_request(f"small{index}", [3], max_tokens=1))
    world.settle()
    assert order_of_starts(world).index("big") <= 2
