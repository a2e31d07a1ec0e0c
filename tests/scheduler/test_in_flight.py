"""``InFlightPrefixes``: who computes which block, and who waits for it."""

from __future__ import annotations

import pytest

from scheduler.in_flight import InFlightPrefixes
from scheduler.request import RequestId, RequestState
from scheduler.testing import make_request

A, B = RequestId("a"), RequestId("b")


def waiter(name: str) -> RequestState:
    return RequestState(make_request(name, [1]), 0)


def test_a_hash_has_one_leader_the_first() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1", b"2"])
    prefixes.lead(B, [b"2", b"3"])
    assert [prefixes.leader_of(h) for h in (b"1", b"2", b"3", b"4")] == [A, A, B, None]
    assert prefixes.leads_any


def test_who_finds_all_its_hashes_led_leads_nothing() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1"])
    prefixes.lead(B, [b"1"])
    assert prefixes.dissolve(B) == []
    assert prefixes.leader_of(b"1") == A


def test_one_waits_for_the_last_of_the_leading_hashes_in_flight() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1", b"2", b"4"])
    assert prefixes.last_shared([b"1", b"2", b"3", b"4"]) == b"2"
    assert prefixes.last_shared([b"3", b"1"]) is None
    assert prefixes.last_shared([]) is None


def test_publishing_a_block_wakes_exactly_those_who_wait_for_it() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1", b"2"])
    one, two = waiter("one"), waiter("two")
    prefixes.set_aside(one, b"1")
    prefixes.set_aside(two, b"2")
    assert (len(prefixes), one.id in prefixes) == (2, True)
    assert prefixes.awaited() == {one.id: b"1", two.id: b"2"}
    assert prefixes.published(A, [b"1"]) == [one]
    assert (len(prefixes), one.id in prefixes) == (1, False)
    assert prefixes.leader_of(b"1") is None
    assert prefixes.published(A, [b"2"]) == [two]
    assert prefixes.leads_any, "until it ends or is preempted"
    prefixes.dissolve(A)
    assert not prefixes.leads_any


def test_only_the_leader_wakes_the_waiters() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1"])
    prefixes.lead(B, [b"9"])
    prefixes.set_aside(waiter("w"), b"1")
    assert prefixes.published(B, [b"1"]) == []
    assert prefixes.published(RequestId("stranger"), [b"1"]) == []
    assert len(prefixes) == 1


def test_i20_when_the_leader_stops_its_waiters_go_on() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1", b"2"])
    one, two = waiter("one"), waiter("two")
    prefixes.set_aside(one, b"1")
    prefixes.set_aside(two, b"2")
    prefixes.published(A, [b"1"])
    assert prefixes.dissolve(A) == [two]
    assert prefixes.dissolve(A) == []
    assert not prefixes.leads_any
    assert len(prefixes) == 0


def test_a_block_published_by_a_later_leader_is_not_taken_from_it() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1", b"2"])
    prefixes.published(A, [b"1"])
    prefixes.lead(B, [b"1"])
    prefixes.dissolve(A)
    assert (prefixes.leader_of(b"1"), prefixes.leader_of(b"2")) == (B, None)


def test_who_gives_up_waiting_is_forgotten_and_the_others_wait_on() -> None:
    prefixes = InFlightPrefixes()
    prefixes.lead(A, [b"1"])
    one, two = waiter("one"), waiter("two")
    prefixes.set_aside(one, b"1")
    prefixes.set_aside(two, b"1")
    prefixes.withdraw(one.id)
    prefixes.withdraw(one.id)
    assert prefixes.awaited() == {two.id: b"1"}
    prefixes.withdraw(two.id)
    assert prefixes.dissolve(A) == []


def test_nobody_is_set_aside_for_a_block_that_nobody_computes() -> None:
    with pytest.raises(AssertionError, match="somebody must compute"):
        InFlightPrefixes().set_aside(waiter("w"), b"1")
