"""Is the engine getting on? Pure logic: numbers in, an opinion out; no clock, no task, no process.

Owns: ``Watchdog``, which is told at intervals whether there is work and how many ticks the engine has sent,
and says whether it is healthy, stalled or hopeless.

Invariants: no work is always healthy; a tick is always progress; a long step is healthy until the limit, so
that a legal prefill of a minute and a half restarts nothing. Only time that this object *watched* counts: when the
whole machine was asleep or the processes were stopped, the gap between two observations is large and is
counted as one ordinary interval, so that nobody is killed for having been suspended.

Rejected: judging by the wall-clock length of one step, which fails a busy engine and passes a dead one.
"""

from __future__ import annotations

from enum import Enum


class Health(Enum):
    """What the watchdog thinks."""

    HEALTHY = "healthy"
    STALLED = "stalled"
    """There is work and nothing has moved for too long: not ready, but possibly only slow."""
    HOPELESS = "hopeless"
    """Stalled for so long that the process is better restarted."""


class Watchdog:
    """Judges the engine from what it shows."""

    __slots__ = (
        "_hopeless_after_s",
        "_last_now_s",
        "_max_gap_s",
        "_num_ticks",
        "_quiet_s",
        "_stalled_after_s",
        "period_s",
    )

    def __init__(
        self, *, stalled_after_s: float = 120.0, hopeless_after_s: float = 600.0, period_s: float = 1.0
    ) -> None:
        """``period_s`` is how often the owner should look; an interval counts as five of them at the most."""
        assert 0 < stalled_after_s <= hopeless_after_s, "an engine stalls before it is given up"
        self._stalled_after_s = stalled_after_s
        self._hopeless_after_s = hopeless_after_s
        self.period_s = period_s
        self._max_gap_s = 5 * period_s
        self._last_now_s: float | None = None
        self._num_ticks = 0
        self._quiet_s = 0.0

    @property
    def quiet_s(self) -> float:
        """Watched seconds since the last progress, with work to do."""
        return self._quiet_s

    def observe(self, now: float, *, has_work: bool, num_ticks: int) -> Health:
        """Take a look at ``now`` (monotonic seconds).

        ``num_ticks`` counts what the engine has sent; any change is progress (a restarted engine starts over).
        """
        gap_s = 0.0 if self._last_now_s is None else min(max(now - self._last_now_s, 0.0), self._max_gap_s)
        self._last_now_s = now
        if not has_work or num_ticks != self._num_ticks:
            self._quiet_s = 0.0
        else:
            self._quiet_s += gap_s
        self._num_ticks = num_ticks
        if self._quiet_s >= self._hopeless_after_s:
            return Health.HOPELESS
        return Health.STALLED if self._quiet_s >= self._stalled_after_s else Health.HEALTHY
