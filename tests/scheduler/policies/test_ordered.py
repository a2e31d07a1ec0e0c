"""``OrderedPolicy`` and the policies built on it."""

from __future__ import annotations

import gc
import sys

import pytest

from scheduler import FCFSPolicy, OrderedPolicy, PriorityPolicy
from scheduler.events import Resumed
from scheduler.request import RequestId, RequestState
from scheduler.testing import make_request


def states(*priorities: int) -> list[RequestState]:
    return [
        RequestState(make_request(f"r{serial}", [1], priority=priority), serial)
        for serial, priority in enumerate(priorities)
    ]


def drain(policy: OrderedPolicy) -> list[str]:
    order = []
    while (state := policy.peek(0.0)) is not None:
        order.append(state.id)
        policy.remove(state)
    return order


def test_fcfs_is_the_order_of_arrival_however_they_come_back() -> None:
    policy = FCFSPolicy()
    for state in reversed(states(0, 0, 0)):
        policy.enqueue(state)
    assert drain(policy) == ["r0", "r1", "r2"]


def test_priority_goes_first_and_arrival_breaks_ties() -> None:
    policy = PriorityPolicy()
    for state in states(1, -1, 1, -1):
        policy.enqueue(state)
    assert drain(policy) == ["r1", "r3", "r0", "r2"]


def test_the_victim_is_the_last_in_order() -> None:
    running = states(5, 0, 1)
    assert FCFSPolicy().victim(running, 0.0) is running[2]
    assert PriorityPolicy().victim(running, 0.0) is running[0]


def test_a_fixed_order_takes_the_whole_grant_and_learns_nothing() -> None:
    policy = FCFSPolicy()
    (state,) = states(0)
    assert policy.grant(state, 7) == 7
    policy.observe([Resumed(RequestId("r0"))])
    assert policy.peek(0.0) is None


def test_peeking_changes_nothing_that_can_be_seen() -> None:
    policy = FCFSPolicy()
    first, second = states(0, 0)
    policy.enqueue(first)
    policy.enqueue(second)
    assert [policy.peek(0.0) for _ in range(3)] == [first, first, first]


def test_who_was_removed_and_came_back_is_listed_once() -> None:
    policy = FCFSPolicy()
    first, second = states(0, 0)
    policy.enqueue(first)
    policy.enqueue(second)
    policy.remove(first)
    assert policy.peek(0.0) is second
    policy.enqueue(first)
    assert drain(policy) == ["r0", "r1"]


def test_removing_a_stranger_is_harmless() -> None:
    policy = FCFSPolicy()
    policy.remove(states(0)[0])
    assert policy.peek(0.0) is None


@pytest.mark.parametrize("removed_first", [True, False])
def test_removed_requests_do_not_pile_up_in_the_middle_of_a_long_queue(removed_first: bool) -> None:
    policy = FCFSPolicy()
    everybody = states(*[0] * 1000)
    for state in everybody:
        policy.enqueue(state)
    stay = everybody[-1] if removed_first else everybody[0]
    for state in everybody:
        if state is not stay:
            policy.remove(state)
    gc.collect()
    kept = sum(sys.getrefcount(state) > 4 for state in everybody)
    assert kept <= 129
    assert drain(policy) == [stay.id]
