"""``WaitingRoom``: who is next."""

from __future__ import annotations

import pytest

from scheduler.errors import ProtocolError
from scheduler.in_flight import InFlightPrefixes
from scheduler.lifecycle import RequestStatus
from scheduler.policies import FCFSPolicy
from scheduler.request import RequestId, RequestState, RequestView
from scheduler.testing import StarvingPolicy, make_request
from scheduler.waiting_room import WaitingRoom


class Room:
    """A waiting room under a policy that prefers the newest."""

    def __init__(self, max_overtakes: int = 100) -> None:
        self.in_flight = InFlightPrefixes()
        self.room = WaitingRoom(StarvingPolicy(), self.in_flight, max_overtakes=max_overtakes)
        self.num_made = 0

    def enter(self) -> RequestState:
        state = self.make()
        self.room.enter(state)
        return state

    def make(self) -> RequestState:
        self.num_made += 1
        return RequestState(make_request(f"r{self.num_made}", [1]), self.num_made)

    def preempted(self) -> RequestState:
        state = self.make()
        state.status = RequestStatus.PREEMPTED
        self.room.enter_preempted(state)
        return state

    def next(self, *, idle: bool = False) -> RequestState | None:
        return self.room.next(0.0, idle=idle)


def test_an_empty_room_has_nobody_next() -> None:
    assert Room().next() is None


def test_the_policy_chooses() -> None:
    world = Room()
    world.enter()
    newest = world.enter()
    assert world.next() is newest
    world.room.leave(newest)
    assert world.room.num_waiting == 1


def test_preempted_requests_go_first_the_oldest_of_them_ahead() -> None:
    world = Room()
    world.enter()
    older, younger = world.make(), world.make()
    for state in (younger, older):
        state.status = RequestStatus.PREEMPTED
        world.room.enter_preempted(state)
    assert world.room.preempted() == (older, younger)
    assert world.next() is older
    world.room.leave(older)
    older.status = RequestStatus.RUNNING
    assert world.next() is younger
    assert (world.room.num_preempted, world.room.num_waiting) == (1, 1)


def test_a_preempted_request_that_ended_is_passed_over() -> None:
    world = Room()
    waiting, ended = world.enter(), world.preempted()
    world.room.leave(ended)
    ended.status = RequestStatus.FINISHED
    assert world.next() is waiting
    assert (world.room.num_preempted, world.room.preempted()) == (0, ())


def test_i23_the_head_of_the_line_goes_next_when_it_was_overtaken_often_enough() -> None:
    world = Room(max_overtakes=2)
    head = world.enter()
    for _ in range(2):
        newest = world.enter()
        assert not world.room.is_aged(head)
        assert world.next() is newest
        world.room.leave(newest)
    world.enter()
    assert world.room.is_aged(head)
    assert world.next() is head


def test_i23_those_who_were_there_before_do_not_count() -> None:
    world = Room(max_overtakes=1)
    first, second = world.enter(), world.enter()
    world.room.leave(first)
    assert not world.room.is_aged(second)
    world.room.leave(world.enter())
    assert world.room.is_aged(second)


def test_i23_without_overtakes_the_order_is_that_of_arrival() -> None:
    world = Room(max_overtakes=0)
    first, second = world.enter(), world.enter()
    assert world.next() is first
    world.room.leave(first)
    assert world.next() is second


def test_who_is_set_aside_is_not_shown_to_the_policy_until_handed_back() -> None:
    world = Room()
    waiting, aside = world.enter(), world.enter()
    world.in_flight.lead(RequestId("leader"), [b"h"])
    world.room.set_aside(aside, b"h")
    assert world.next() is waiting
    assert world.room.waiting() == (waiting, aside)
    world.room.hand_back(world.in_flight.published(RequestId("leader"), [b"h"]))
    assert world.next() is aside


def test_who_leaves_while_set_aside_is_withdrawn() -> None:
    world = Room()
    aside = world.enter()
    world.in_flight.lead(RequestId("leader"), [b"h"])
    world.room.set_aside(aside, b"h")
    world.room.leave(aside)
    assert world.in_flight.dissolve(RequestId("leader")) == []


def test_i20_somebody_must_start_when_nothing_runs_whatever_the_policy_prefers() -> None:
    class Reluctant(FCFSPolicy):
        def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - at no time
            return None

    room = WaitingRoom(Reluctant(), InFlightPrefixes(), max_overtakes=100)
    state = RequestState(make_request("r", [1]), 0)
    room.enter(state)
    assert room.next(0.0, idle=False) is None
    assert room.next(0.0, idle=True) is state


def test_a_policy_that_names_a_stranger_is_told_so() -> None:
    stranger = RequestState(make_request("stranger", [1]), 99)

    class Confused(FCFSPolicy):
        def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - at no time
            return stranger

    room = WaitingRoom(Confused(), InFlightPrefixes(), max_overtakes=100)
    room.enter(RequestState(make_request("r", [1]), 0))
    with pytest.raises(ProtocolError, match="'stranger', which does not queue"):
        room.next(0.0, idle=False)


def test_a_policy_that_names_somebody_set_aside_is_told_so() -> None:
    class Forgetful(StarvingPolicy):
        def remove(self, request: RequestView) -> None:
            pass

    in_flight = InFlightPrefixes()
    room = WaitingRoom(Forgetful(), in_flight, max_overtakes=100)
    state = RequestState(make_request("r", [1]), 0)
    room.enter(state)
    in_flight.lead(RequestId("leader"), [b"h"])
    room.set_aside(state, b"h")
    with pytest.raises(ProtocolError, match="'r', which does not queue"):
        room.next(0.0, idle=False)
