"""Continuous batching for language models: which tokens of which requests are computed next.

A library of its own: no clock, no thread, no tensor, nothing beyond the standard library. ``Scheduler`` makes
plans, whoever runs the model answers with results, and events tell what happened. Begin reading at
``scheduler/scheduler.py``; ``docs/laws.md`` says what always holds, ``docs/writing-a-policy.md`` how to change who
goes first, and ``scheduler.testing`` is the kit that checks both.
"""

from scheduler.accountant import KVLayout, MemoryAccountant, MemoryPlan, MemoryStats, plan_memory, request_bytes
from scheduler.census import Blocking, Census, CensusEntry
from scheduler.config import SchedulerConfig
from scheduler.errors import (
    AccountingError,
    AdmissionError,
    ConfigError,
    DuplicateRequestError,
    IllegalTransitionError,
    InvalidRequestError,
    MemoryFullError,
    PlanError,
    ProtocolError,
    QueueFullError,
    RequestTooLargeError,
    SchedulerError,
)
from scheduler.events import (
    Admitted,
    BlockEvicted,
    Event,
    Finished,
    Preempted,
    PrefixHit,
    PromptScored,
    Resumed,
    TokenLogprob,
    TokensCommitted,
)
from scheduler.lifecycle import FinishReason, RequestStatus
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan, StepResult
from scheduler.policies import POLICIES, FCFSPolicy, OrderedPolicy, Policy, PriorityPolicy
from scheduler.request import BlockId, Request, RequestId, RequestKind, RequestView, StopRule
from scheduler.scheduler import Scheduler
from scheduler.stats import SchedulerStats

__all__ = [
    "POLICIES",
    "AccountingError",
    "AdmissionError",
    "Admitted",
    "BlockEvicted",
    "BlockId",
    "Blocking",
    "Census",
    "CensusEntry",
    "ConfigError",
    "DuplicateRequestError",
    "Event",
    "FCFSPolicy",
    "FinishReason",
    "Finished",
    "IllegalTransitionError",
    "InvalidRequestError",
    "KVLayout",
    "MemoryAccountant",
    "MemoryFullError",
    "MemoryPlan",
    "MemoryStats",
    "OrderedPolicy",
    "PlanError",
    "Policy",
    "Preempted",
    "PrefixHit",
    "PriorityPolicy",
    "PromptScored",
    "ProtocolError",
    "QueueFullError",
    "Request",
    "RequestId",
    "RequestKind",
    "RequestStatus",
    "RequestTooLargeError",
    "RequestView",
    "Resumed",
    "ScheduledSlice",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerError",
    "SchedulerStats",
    "SliceResult",
    "StepPlan",
    "StepResult",
    "StopRule",
    "TokenLogprob",
    "TokensCommitted",
    "plan_memory",
    "request_bytes",
]
