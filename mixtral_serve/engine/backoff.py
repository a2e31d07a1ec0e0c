"""How long to wait before a dead engine is started again.

Owns: ``RestartBackoff``: doubling delays that start over once an engine has been up for a while. Pure; told the time.
"""

from __future__ import annotations


class RestartBackoff:
    """0.5, 1, 2, ... up to 30 seconds; from the beginning after a healthy minute."""

    __slots__ = ("_first_s", "_healthy_s", "_most_s", "_next_s", "_up_since_s")

    def __init__(self, *, first_s: float = 0.5, most_s: float = 30.0, healthy_s: float = 60.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._healthy_s = healthy_s
        self._next_s = first_s
        self._up_since_s: float | None = None

    def note_ready(self, now: float) -> None:
        """The engine came up."""
        self._up_since_s = now

    def next_delay_s(self, now: float) -> float:
        """The engine died: seconds to wait before the next start."""
        if self._up_since_s is not None and now - self._up_since_s >= self._healthy_s:
            self._next_s = self._first_s
        self._up_since_s = None
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self._most_s)
        return delay_s
