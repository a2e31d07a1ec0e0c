"""The life of a request: its statuses, its ends, and the one table of legal moves.

    WAITING ──admit──► RUNNING ──► FINISHED
       │                │   ▲          ▲
       │             preempt resume    │
       │                ▼   │          │
       │              PREEMPTED ───────┤
       └───────────────────────────────┘

Owns: ``RequestStatus``, ``FinishReason``, ``TRANSITIONS`` and ``move``, the only function in the library that
changes a status. A move that the table does not list raises and changes nothing.

There is no "prefilling" status on purpose: whether a request is in its prompt or in its answer is a property
of two counters (see ``scheduler.request``), and a status that repeats a counter can disagree with it.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Protocol

from scheduler.errors import IllegalTransitionError


class RequestStatus(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended. Each request ends exactly once, with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    DEADLINE = "deadline"


TRANSITIONS: Final[dict[RequestStatus, frozenset[RequestStatus]]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED, RequestStatus.FINISHED}),
    RequestStatus.PREEMPTED: frozenset({RequestStatus.RUNNING, RequestStatus.FINISHED}),
    RequestStatus.FINISHED: frozenset(),
}


def transition_table() -> str:
    """``TRANSITIONS`` as the Markdown table that stands in ``docs/laws.md``."""
    order = list(RequestStatus)
    rows = [
        (status.value, ", ".join(target.value for target in sorted(TRANSITIONS[status], key=order.index)) or "nothing")
        for status in order
    ]
    return "\n".join(["| from | may become |", "|---|---|", *(f"| {source} | {targets} |" for source, targets in rows)])


class HasStatus(Protocol):
    """What ``move`` needs of its argument."""

    status: RequestStatus


def move(request: HasStatus, to: RequestStatus) -> None:
    """Change the status of ``request``.

    Raises:
        IllegalTransitionError: the table does not allow it; nothing changed.
    """
    if to not in TRANSITIONS[request.status]:
        raise IllegalTransitionError(f"{request.status.value} -> {to.value}")
    request.status = to
