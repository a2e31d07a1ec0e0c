"""The life of a request is one table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from scheduler.errors import IllegalTransitionError
from scheduler.lifecycle import TRANSITIONS, RequestStatus, move

EDGES = [(source, target) for source in RequestStatus for target in RequestStatus]


@dataclass
class Anything:
    status: RequestStatus


@pytest.mark.parametrize(("source", "target"), [edge for edge in EDGES if edge[1] in TRANSITIONS[edge[0]]])
def test_a_listed_move_changes_the_status(source: RequestStatus, target: RequestStatus) -> None:
    thing = Anything(source)
    move(thing, target)
    assert thing.status is target


@pytest.mark.parametrize(("source", "target"), [edge for edge in EDGES if edge[1] not in TRANSITIONS[edge[0]]])
def test_any_other_move_raises_and_changes_nothing(source: RequestStatus, target: RequestStatus) -> None:
    thing = Anything(source)
    with pytest.raises(IllegalTransitionError, match=f"{source.value} -> {target.value}"):
        move(thing, target)
    assert thing.status is source


def test_every_status_is_in_the_table_and_only_finished_is_final() -> None:
    assert set(TRANSITIONS) == set(RequestStatus)
    assert [status for status, targets in TRANSITIONS.items() if not targets] == [RequestStatus.FINISHED]


def test_every_status_but_waiting_can_be_reached_and_each_can_finish() -> None:
    assert {target for targets in TRANSITIONS.values() for target in targets} == set(RequestStatus) - {
        RequestStatus.WAITING
    }
    assert all(RequestStatus.FINISHED in targets for status, targets in TRANSITIONS.items() if targets)
