"""The scheduler's exception tree.

    SchedulerError
    ├── ConfigError               a configuration that contradicts itself
    ├── PlanError                 a memory plan that does not add up (carries the table)
    ├── AdmissionError            a request that is refused; the scheduler is unchanged
    │   ├── DuplicateRequestError     the id is already known
    │   ├── InvalidRequestError       a field is outside its bounds
    │   ├── RequestTooLargeError      it could never fit, even alone
    │   ├── QueueFullError            the waiting queue is at its limit
    │   └── MemoryFullError           its structures would not fit under the memory budget
    ├── IllegalTransitionError    a status change that the table in lifecycle.py forbids
    ├── AccountingError      a block or a reservation released twice, the null block touched, ...
    └── ProtocolError             step/commit called out of turn, or a result that fits no plan

``AdmissionError`` is for callers; the last three mean a defect in the code that drives the scheduler (or in
the scheduler itself) and are raised before anything changed.
"""

from __future__ import annotations


class SchedulerError(Exception):
    """Root of every error this library raises on purpose."""


class ConfigError(SchedulerError, ValueError):
    """A configuration contradicts itself. ``field`` names the offending field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PlanError(SchedulerError):
    """A memory plan exceeds its budget. The message is a table of what was asked and what is there."""


class AdmissionError(SchedulerError):
    """A request was refused; no state changed."""


class DuplicateRequestError(AdmissionError):
    """A request with this id is already live."""


class InvalidRequestError(AdmissionError):
    """A field of the request is outside its bounds. ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class RequestTooLargeError(AdmissionError):
    """Prompt plus output could never fit, even with the whole machine to itself.

    ``num_tokens`` is what was asked (prompt + max_tokens), ``limit`` what one request may hold.
    """

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(f"the request needs {num_tokens} tokens of KV cache, one request may hold {limit}")
        self.num_tokens = num_tokens
        self.limit = limit


class QueueFullError(AdmissionError):
    """The waiting queue is at its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} requests are already waiting")
        self.limit = limit


class MemoryFullError(AdmissionError):
    """A reservation would exceed the budget. Nothing was reserved."""

    def __init__(self, name: str, num_bytes: int, available_bytes: int) -> None:
        super().__init__(f"{name}: {num_bytes} bytes are needed, {available_bytes} are available")
        self.num_bytes = num_bytes
        self.available_bytes = available_bytes


class IllegalTransitionError(SchedulerError):
    """A status change that ``lifecycle.TRANSITIONS`` forbids."""


class AccountingError(SchedulerError):
    """A block or a reservation was released twice, or the null block was touched."""


class ProtocolError(SchedulerError):
    """``step`` and ``commit`` were called out of turn, or a result does not fit the plan."""
