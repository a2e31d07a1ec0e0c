"""``OrderedPolicy``: the common part of policies that sort the waiting requests by a key.

Owns a heap with lazy deletion: ``remove`` marks, ``peek`` drops marked entries from the top, so both are
logarithmic, amortised. A subclass says what the key is; the key must not change while a request waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from scheduler.events import Event
from scheduler.request import RequestId, RequestView

Key = tuple[float, ...]


class OrderedPolicy(ABC):
    """Waiting requests in ascending order of ``key``; the victim is the running request with the largest."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, RequestView]] = []
        self._ticket_of: dict[RequestId, int] = {}
        self._next_ticket = 0

    @abstractmethod
    def key(self, request: RequestView) -> Key:
        """Smaller goes first. Must be unique: end it with ``serial``."""

    def enqueue(self, request: RequestView) -> None:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._ticket_of[request.id] = ticket
        heappush(self._heap, (self.key(request), ticket, request))

    def remove(self, request: RequestView) -> None:
        self._ticket_of.pop(request.id, None)
        # Removed entries stay until they surface; without this, cancelling in the middle of a long queue
        # would keep every cancelled request's prompt in memory.
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._ticket_of):
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapify(self._heap)

    def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - other policies look at the time
        while self._heap and not self._is_live(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - likewise
        return max(running, key=self.key)

    def grant(self, request: RequestView, budget: int) -> int:  # noqa: ARG002 - all get what they can
        return budget

    def observe(self, events: Sequence[Event]) -> None:  # noqa: B027 - doing nothing is the answer, not an omission
        """An order by fixed keys learns nothing from events."""

    def _is_live(self, entry: tuple[Key, int, RequestView]) -> bool:
        return self._ticket_of.get(entry[2].id) == entry[1]
