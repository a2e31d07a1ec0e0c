"""The ``Policy`` protocol: a few narrow questions that decide who goes first. Mechanism stays in ``Scheduler``.

A policy orders the waiting requests, picks victims and may shrink a request's share of a step. It cannot
break safety: whatever it answers, budgets hold, nothing leaks, no one is preempted for ever, and no waiting request
is overtaken by more than ``max_overtakes`` later arrivals.

Rules for implementers: keep state of your own, change it only in the calls below, never touch the views; no
call may cost time proportional to the number of waiting requests (logarithmic is fine).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.events import Event
from scheduler.request import RequestView


class Policy(Protocol):
    """Who goes first."""

    def enqueue(self, request: RequestView) -> None:
        """The request waits now. It may have been here before: set aside for an equal prefix, then handed back."""
        ...

    def remove(self, request: RequestView) -> None:
        """The request no longer waits: it was admitted, set aside, or ended."""
        ...

    def peek(self, now: float) -> RequestView | None:
        """The waiting request to admit next, or None to admit nobody now. Changes nothing that can be seen."""
        ...

    def victim(self, running: Sequence[RequestView], now: float) -> RequestView:
        """Which of ``running`` (never empty, in order of arrival) gives its blocks back."""
        ...

    def grant(self, request: RequestView, budget: int) -> int:
        """How many tokens of the step the request gets. ``budget`` is what it could get: at least 1, at
        most its pending tokens. Answers outside 1 to ``budget`` are clipped."""
        ...

    def observe(self, events: Sequence[Event]) -> None:
        """What happened, for policies that keep count."""
        ...
