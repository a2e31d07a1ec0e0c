"""Policies that mean harm. Every law must hold under them, which is what "no policy can break the bounds" means.

``StarvingPolicy`` always prefers the newest request, sends the oldest candidate away and grants one token at a
time. ``ErraticPolicy`` answers with anything that the protocol allows, sizes outside the bounds included, and
often refuses to name anybody. Both keep to the protocol: they name only whom they were offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scheduler.events import Event
from scheduler.request import RequestId, RequestView


class StarvingPolicy:
    """Newest first, the oldest candidate is the victim, one token at a time."""

    def __init__(self) -> None:
        self._waiting: dict[RequestId, RequestView] = {}

    def enqueue(self, request: RequestView) -> None:
        self._waiting[request.id] = request

    def remove(self, request: RequestView) -> None:
        del self._waiting[request.id]

    def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - time makes it no kinder
        return max(self._waiting.values(), key=lambda request: request.serial, default=None)

    def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - nor when it is
        return running[0]

    def grant(self, request: RequestView, budget: int) -> int:  # noqa: ARG002 - nor who asks
        return 1

    def observe(self, events: Sequence[Event]) -> None:
        """It has made up its mind."""


class ErraticPolicy(StarvingPolicy):
    """Any answer at all, the same ones in every run."""

    def __init__(self) -> None:
        super().__init__()
        self._random = Random(0)

    def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - anything goes
        candidates = sorted(self._waiting.values(), key=lambda request: request.serial)
        return self._random.choice([None, *candidates])

    def victim(self, running: Sequence[RequestView], now: float) -> RequestView:  # noqa: ARG002 - anything goes
        return self._random.choice(running)

    def grant(self, request: RequestView, budget: int) -> int:  # noqa: ARG002 - anything goes
        return self._random.choice([-(10**9), 0, 1, budget, 10**9])
