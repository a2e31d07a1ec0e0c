"""Time for code that must not look at one: the ``Clock`` seam and a virtual clock.

The scheduler takes ``now`` as an argument; what drives it needs a clock. ``VirtualClock`` moves only when told,
so tests and simulations run at the speed of the machine and give the same answer every time.
"""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. ``time.monotonic`` fits."""

    def __call__(self) -> float: ...


class VirtualClock:
    """A clock that stands still until ``advance_to`` or ``advance`` moves it. Never goes back."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        self.advance_to(self._now + seconds)

    def advance_to(self, time_s: float) -> None:
        """Move forward to ``time_s``.

        Raises:
            ValueError: ``time_s`` is in the past.
        """
        if time_s < self._now:
            raise ValueError(f"the clock stands at {self._now}, it does not go back to {time_s}")
        self._now = time_s
