"""``Deadlines``: who ends next because its time is up.

Owns a heap of all requests that have a deadline. Who ends in time stays in it until its deadline surfaces; a heap that
is mostly theirs is rebuilt, so it holds a small multiple of the live requests at most and every operation is
logarithmic, amortised. Rejected: a look at every live request in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

from scheduler.lifecycle import RequestStatus
from scheduler.request import RequestState

_MIN_KEPT: Final = 64
"""A heap no larger than this is not worth rebuilding."""


class Deadlines:
    """The deadlines of live requests."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, RequestState]] = []

    def add(self, state: RequestState) -> None:
        """A request came; one without a deadline is not remembered."""
        if state.request.deadline_s is not None:
            heappush(self._heap, (state.request.deadline_s, state.serial, state))

    def overdue(self, now: float) -> Iterator[RequestState]:
        """Live requests whose time is up, the earliest first; each is handed out once, and must be ended."""
        while self._heap and self._heap[0][0] <= now:
            state = heappop(self._heap)[2]
            if state.status is not RequestStatus.FINISHED:
                yield state

    def tidy(self, num_live: int) -> None:
        """Forget those that ended in time, where they are most of what is kept."""
        if len(self._heap) > _MIN_KEPT + 2 * num_live:
            self._heap = [entry for entry in self._heap if entry[2].status is not RequestStatus.FINISHED]
            heapify(self._heap)
