"""``EventHeap``: what happens next in a discrete-event world.

Entries come out by time, then by priority (smaller first), then in the order they were put in. The last rule
makes every run of a seeded world the same run.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


class EventHeap(Generic[T]):
    """A priority queue ordered by (time, priority, serial)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, T]] = []
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_time_s(self) -> float | None:
        """When the next entry is due; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def push(self, time_s: float, entry: T, *, priority: int = 0) -> None:
        """Let ``entry`` happen at ``time_s``."""
        heappush(self._heap, (time_s, priority, self._next_serial, entry))
        self._next_serial += 1

    def pop(self) -> tuple[float, T]:
        """Take the next entry and its time.

        Raises:
            IndexError: nothing is left.
        """
        time_s, _, _, entry = heappop(self._heap)
        return time_s, entry
