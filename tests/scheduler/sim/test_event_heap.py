"""``EventHeap`` gives entries by time, then priority, then in the order they came."""

from __future__ import annotations

import pytest

from scheduler.sim import EventHeap


def test_entries_come_out_by_time_then_priority_then_serial() -> None:
    heap: EventHeap[str] = EventHeap()
    heap.push(2.0, "late")
    heap.push(1.0, "second", priority=1)
    heap.push(1.0, "third", priority=1)
    heap.push(1.0, "first")
    assert (len(heap), heap.next_time_s) == (4, 1.0)
    assert [heap.pop() for _ in range(4)] == [(1.0, "first"), (1.0, "second"), (1.0, "third"), (2.0, "late")]
    assert (len(heap), heap.next_time_s) == (0, None)


def test_entries_need_not_be_comparable() -> None:
    heap: EventHeap[object] = EventHeap()
    one, two = object(), object()
    heap.push(1.0, one)
    heap.push(1.0, two)
    assert (heap.pop()[1], heap.pop()[1]) == (one, two)


def test_an_empty_heap_has_nothing_to_pop() -> None:
    with pytest.raises(IndexError):
        EventHeap[int]().pop()
