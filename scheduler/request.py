"""What a request asks for, and what the scheduler knows of it while it lives.

Owns: ``Request`` (frozen, the caller's words), ``RequestState`` (mutable and slotted, owned by ``Scheduler``
alone) and ``RequestView`` (the read-only face of a state that policies see).

The one idea: **a request is two numbers.** ``num_tokens`` counts the tokens that are known (prompt plus
output so far), ``num_computed_tokens`` counts those whose keys and values are in the cache. A step hands out
tokens until the second number catches up with the first; then a new token is sampled and the first number is
ahead by one again. Chunked prefill, a prefix-cache hit, decode and resuming after a preemption are all this
rule; none of them is a mode.

Invariants: ``0 <= num_computed_tokens <= num_tokens``; ``tokens`` and ``block_table`` are append-only while
the request runs (plans share them without copying); on preemption ``block_table`` is *replaced* by a fresh
list, never truncated, so that an older plan still reads what it was given.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from math import isnan
from typing import NewType, Protocol

from scheduler.accountant import ReservationId
from scheduler.errors import InvalidRequestError
from scheduler.lifecycle import RequestStatus

RequestId = NewType("RequestId", str)
BlockId = NewType("BlockId", int)

TOKEN_TYPECODE = "i"
"""Token ids are kept in ``array('i')``: four bytes a token, so that a waiting prompt has a known price."""


class RequestKind(Enum):
    """What is wanted of the model."""

    GENERATE = "generate"
    """Sample tokens after the prompt. With ``max_tokens`` 0 the prompt is computed all the same, and its blocks can be
    found by those who come later: a warm-up of the prefix cache."""
    SCORE = "score"
    """Log-probabilities of the prompt's own tokens; nothing is sampled."""
    EMBED = "embed"
    """One vector for the prompt; nothing is sampled."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """When generation ends, as far as token ids tell.

    Stop *strings* need text and are decided outside; they reach the scheduler as ``SliceResult.finish``.
    """

    max_tokens: int
    """Upper bound on sampled tokens. 0 for the kinds that sample nothing."""
    stop_token_ids: frozenset[int] = frozenset()
    """Sampling one of these ends the request with STOP; the token is reported. End-of-sequence is one."""
    min_tokens: int = 0
    """No stop token counts before this many tokens were sampled."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request as its caller states it. Validates itself; the scheduler adds only what depends on its size."""

    id: RequestId
    prompt: array[int]
    """Prompt token ids, never empty, never changed after construction."""
    stop: StopRule
    arrival_s: float
    """Seconds on the caller's monotonic clock."""
    kind: RequestKind = RequestKind.GENERATE
    priority: int = 0
    """Lower runs sooner, under policies that look at it."""
    tenant: str = ""
    """Whom it belongs to: prefixes are shared only within one tenant, fairness counts per tenant."""
    cache_salt: str = ""
    """Narrows prefix sharing further, within the tenant."""
    deadline_s: float | None = None
    """Monotonic time after which the request ends with DEADLINE, wherever it is."""
    prompt_logprobs: bool = False
    """Log-probabilities of the prompt's tokens are wanted (implied by SCORE)."""
    extra_bytes: int = 0
    """What its structures may need beyond ``accountant.request_bytes``: alternatives of log-probabilities, say."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequestError("prompt", "at least one token is needed")
        if min(self.prompt) < 0:
            raise InvalidRequestError("prompt", "token ids are not negative")
        if self.stop.max_tokens < 0:
            raise InvalidRequestError("max_tokens", f"must not be negative, got {self.stop.max_tokens}")
        if self.stop.max_tokens and self.kind is not RequestKind.GENERATE:
            raise InvalidRequestError("max_tokens", f"must be 0 for {self.kind.value} requests")
        if not 0 <= self.stop.min_tokens <= self.stop.max_tokens:
            raise InvalidRequestError("min_tokens", f"must be between 0 and max_tokens ({self.stop.max_tokens})")
        # A time that compares with nothing would spoil the order of everybody else's deadlines.
        if isnan(self.arrival_s):
            raise InvalidRequestError("arrival_s", "must be a number")
        if self.deadline_s is not None and isnan(self.deadline_s):
            raise InvalidRequestError("deadline_s", "must be a number")
        if self.extra_bytes < 0:
            raise InvalidRequestError("extra_bytes", f"must not be negative, got {self.extra_bytes}")

    @property
    def scores_prompt(self) -> bool:
        """Whether every prompt position needs logits; such requests skip the prefix look-up."""
        return self.prompt_logprobs or self.kind is RequestKind.SCORE

    @property
    def max_total_tokens(self) -> int:
        """The largest number of tokens it can ever hold: what admission, decode and the accountant count."""
        return len(self.prompt) + self.stop.max_tokens


class RequestView(Protocol):
    """The read-only face of a ``RequestState``: all that a policy may look at."""

    @property
    def id(self) -> RequestId: ...
    @property
    def serial(self) -> int:
        """Position in the order of arrival; unique, so it breaks every tie."""
        ...

    @property
    def kind(self) -> RequestKind: ...
    @property
    def status(self) -> RequestStatus: ...
    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def deadline_s(self) -> float | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


@dataclass(slots=True, eq=False)
class RequestState:
    """What the scheduler knows of a live request. Only ``Scheduler`` and ``KVCacheManager`` change it."""

    request: Request
    serial: int
    overtake_limit: int = 0
    """How many must have left the waiting room until the request is aged and may not be overtaken any more."""
    status: RequestStatus = RequestStatus.WAITING
    tokens: array[int] = field(init=False)
    """Prompt plus sampled tokens."""
    num_computed_tokens: int = 0
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of the leading full blocks, extended on demand; survives preemption (tokens only grow)."""
    num_published_blocks: int = 0
    """Leading blocks of the table that are in the prefix cache (found there or published)."""
    publishing: bool = True
    """False once a block of it lost the race to an equal one: from there on its blocks stay private."""
    num_cached_tokens: int | None = None
    """Prefix-cache hit of the first admission, in tokens; None before it."""
    num_preemptions: int = 0
    num_reported_prompt_logprobs: int = 0
    """Prompt positions already reported; recomputation after a preemption does not report them again."""
    embedding: object | None = None
    """The runner's partial embedding, handed back with the next slice. Opaque."""
    reservation: ReservationId | None = None
    """What the memory accountant holds for it."""

    def __post_init__(self) -> None:
        self.tokens = array(TOKEN_TYPECODE, self.request.prompt)

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def kind(self) -> RequestKind:
        return self.request.kind

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def arrival_s(self) -> float:
        return self.request.arrival_s

    @property
    def deadline_s(self) -> float | None:
        return self.request.deadline_s

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending_tokens(self) -> int:
        """Known tokens whose keys and values are not in the cache yet."""
        return len(self.tokens) - self.num_computed_tokens
