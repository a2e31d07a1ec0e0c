"""The table of requests, asked for by the API process: who runs, who waits, for what, and how long yet.

Owns: ``Inspections`` (the questions that are under way and the answers as they come), ``RequestTable`` and the
estimate of a wait. One question per tenant is under way at a time; who asks meanwhile gets the same answer.

An estimate is arithmetic on what was measured of late: for a seat or for blocks, the requests ahead times the time
between two ends; for tokens, the tokens ahead over the tokens per second. Where nothing was measured, or the wait
depends on something that no number here tells (another request's prefix, a policy), it is unknown, and said to be.
Rejected: the prompt's length and the largest output as a stand-in for a measurement; most answers end long before.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mixtral_serve.engine.admission import FinishRate
from mixtral_serve.engine.messages import Inspect, StepTiming, Tick
from scheduler.census import Blocking, Census, CensusEntry

MAX_ENTRIES: Final = 256
"""Requests that a table tells of one by one: those that run and those that go next."""
_WINDOW: Final = 64


@dataclass(frozen=True, slots=True)
class RequestTable:
    """A tenant's requests and, aligned with the census' entries, the seconds until each starts."""

    census: Census
    estimated_wait_s: tuple[float | None, ...]
    """0 for those that run; None where it cannot be told."""


class TokenRate:
    """How many tokens the last steps computed per second."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def note_step(self, timing: StepTiming) -> None:
        """A step ran."""
        self._steps.append((timing.num_tokens, timing.total_s))

    def tokens_per_s(self) -> float | None:
        """None before anything took time."""
        num_tokens = sum(count for count, _ in self._steps)
        seconds = sum(seconds for _, seconds in self._steps)
        return num_tokens / seconds if num_tokens and seconds > 0 else None


def estimated_wait_s(entry: CensusEntry, *, seconds_per_end: float | None, tokens_per_s: float | None) -> float | None:
    """Seconds until the request starts, by what was measured; None where that does not tell."""
    if entry.blocking is None:
        return 0.0
    if entry.num_ahead is None or entry.num_tokens_ahead is None:
        return None
    if entry.blocking in (Blocking.SEATS, Blocking.BLOCKS):
        return None if seconds_per_end is None else seconds_per_end * (entry.num_ahead + 1)
    if entry.blocking is Blocking.TOKEN_BUDGET:
        return None if tokens_per_s is None else entry.num_tokens_ahead / tokens_per_s
    return None


class Inspections:
    """Asks the engine, and hands its answers to all who wait for them. Lives on one event loop."""

    def __init__(self, post: Callable[[Inspect], None], finish_rate: FinishRate) -> None:
        self._post = post
        self._finish_rate = finish_rate
        self._token_rate = TokenRate()
        self._asked: dict[str, asyncio.Future[RequestTable | None]] = {}

    async def ask(self, tenant: str) -> RequestTable | None:
        """The table as of the next tick; None if the engine ends before."""
        future = self._asked.get(tenant)
        if future is None:
            future = self._asked[tenant] = asyncio.get_running_loop().create_future()
            self._post(Inspect(tenant, MAX_ENTRIES))
        return await asyncio.shield(future)  # one who leaves does not take the others' answer along

    def on_tick(self, tick: Tick, now: float) -> None:
        """Take in what a tick measured and answered."""
        if tick.timing is not None:
            self._token_rate.note_step(tick.timing)
        for census in tick.censuses:
            future = self._asked.pop(census.tenant, None)
            if future is not None:
                future.set_result(self._table(census, now))

    def end(self) -> None:
        """The engine answers nothing more."""
        for future in self._asked.values():
            future.set_result(None)
        self._asked.clear()

    def _table(self, census: Census, now: float) -> RequestTable:
        seconds_per_end = self._finish_rate.seconds_per_end(now)
        tokens_per_s = self._token_rate.tokens_per_s()
        waits = [
            estimated_wait_s(entry, seconds_per_end=seconds_per_end, tokens_per_s=tokens_per_s)
            for entry in census.entries
        ]
        return RequestTable(census, tuple(waits))
