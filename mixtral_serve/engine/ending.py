"""From the last delta of a request that ended badly to the exception that its consumer sees.

Owns: ``error_of``, and the words in which the client itself ends requests. A refusal is told apart by the name that the
engine gives it: those that time heals invite the caller to come again, all others are final.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mixtral_serve.engine.errors import EngineError, MemoryPressure, QueueFull, RequestFailed, RequestRefused
from mixtral_serve.engine.messages import Delta
from scheduler.errors import MemoryFullError, QueueFullError

ENGINE_DIED: Final = "the engine stopped while it worked on the request"
SHUTTING_DOWN: Final = "the server is shutting down"

_COME_AGAIN: Final = frozenset({QueueFullError.__name__, MemoryFullError.__name__})
"""Refusals by the engine that time heals."""


def error_of(delta: Delta, queue_full: Callable[[], QueueFull]) -> EngineError:
    """What a last delta with finish reason "error" means; ``queue_full`` makes the error of a full queue."""
    detail = delta.error or ""
    if delta.refusal in _COME_AGAIN:
        return queue_full()
    if delta.refusal == MemoryPressure.__name__:
        return MemoryPressure()
    if delta.refusal is not None:
        return RequestRefused(detail)
    if detail in (ENGINE_DIED, SHUTTING_DOWN):
        return RequestFailed(detail, detail=detail, is_retryable=True)
    return RequestFailed("the request failed in the engine", detail=detail)
