"""What may watch an engine from the API process: its state, and a protocol for listeners.

Owns: ``EngineState`` and ``EngineListener``. Metrics, the usage ledger and traces are listeners; the client knows
none of them by name, and an unused one costs nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from mixtral_serve.engine.messages import Submit, Tick


class EngineState(Enum):
    """The engine as the API sees it."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "dead"


class EngineListener(Protocol):
    """Sees what goes by: metrics, ledger, trace. Called on the event loop, so it must not block.

    It cannot disturb a step, and what it raises is logged and contained.
    """

    def on_submit(self, submit: Submit, now: float) -> None:
        """A request was accepted and is on its way to the engine."""
        ...

    def on_tick(self, tick: Tick, now: float) -> None:
        """A step's outcome. When an engine dies, a tick without timing ends its requests with errors."""
        ...

    def on_state(self, state: EngineState) -> None:
        """The state changed."""
        ...
