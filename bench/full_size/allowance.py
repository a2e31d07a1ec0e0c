"""The time that the whole measurement may take, divided among its stages.

Owns: the stages, in their order, and the moment each must end by. The moments are fixed when the process starts, so
what a stage leaves unused belongs to the next. A stage looks at ``is_over`` between two steps of the model, never in
the middle of one; the last moment therefore lies before the end of the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias

Stage: TypeAlias = Literal["build", "grid", "bursts", "rates", "load"]

ENDS: Final[dict[Stage, float]] = {"build": 0.40, "grid": 0.47, "bursts": 0.63, "rates": 0.78, "load": 0.95}
"""Share of the whole time after which each stage must have ended."""

_OWN_STAT: Final = Path("/proc/self/stat")


class NoTimeError(Exception):
    """A piece of work was given up because its stage had to end."""


class Allowance:
    """Seconds for everything, counted from ``began_s`` on ``clock``."""

    def __init__(self, seconds: float, *, began_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._began_s = began_s
        self._clock = clock
        self.spent_s: dict[Stage, float] = {}
        """What each stage took that has ended."""
        self._last_s = began_s

    def left_s(self, stage: Stage) -> float:
        """Seconds until ``stage`` must end; negative when it should have ended."""
        return self._began_s + ENDS[stage] * self.seconds - self._clock()

    def is_over(self, stage: Stage) -> bool:
        """Whether ``stage`` must not begin another piece of work."""
        return self.left_s(stage) <= 0

    def end(self, stage: Stage) -> None:
        """Note that ``stage`` has ended."""
        now_s = self._clock()
        self.spent_s[stage] = now_s - self._last_s
        self._last_s = now_s

    @property
    def used_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began_s


def process_began_s() -> float:
    """When this process began, on the clock of ``time.monotonic``: imports count as well.

    Where the kernel does not say, now.
    """
    now_s = time.monotonic()
    try:
        fields = _OWN_STAT.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        began_ticks = int(fields[19])
    except (OSError, IndexError, ValueError):
        return now_s
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - began_ticks / os.sysconf("SC_CLK_TCK")
    return now_s - max(0.0, age_s)
