"""``Census``: who is here, what each waits for, and how many go before it. For people and their tools.

Owns: ``Blocking``, the reasons why a request does not run; ``CensusEntry`` and ``Census``, frozen copies of what was
true between two steps; ``take_census``, which makes them and changes nothing; and ``with_compiling``, by which a driver
adds the requests that it holds back.

The reason comes from the planning of the last step itself: when the seats were filled, one thing ended the round,
and since no one slips past the first that does not fit, it is what all who queue are waiting for. It is
not guessed afterwards from counters.

One walk over all live requests, and one sort of those that queue: some milliseconds for thousands. Nothing calls it
unless somebody asks. Rejected: a place in the queue that is kept up at every step, which everybody would pay for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from scheduler.lifecycle import RequestStatus
from scheduler.policies.base import Policy
from scheduler.policies.ordered import OrderedPolicy
from scheduler.request import Request, RequestId, RequestKind, RequestState
from scheduler.waiting_room import WaitingRoom


class Blocking(Enum):
    """What a request that does not run is waiting for."""

    NEXT_STEP = "next_step"
    """The next step: it came, or was handed back, after the last one was planned."""
    SEATS = "seats"
    """One of the ``max_num_seqs`` seats."""
    BLOCKS = "blocks"
    """KV blocks, for the request at the head of the queue."""
    TOKEN_BUDGET = "token_budget"
    """Steps whose tokens are not all taken by prompts that run."""
    PREEMPTION = "preemption"
    """A step in which blocks suffice for those that run."""
    POLICY = "policy"
    """The policy, which admits nobody at the moment."""
    PREFIX = "prefix"
    """An equal prefix, which another request is computing."""
    GRAMMAR = "grammar"
    """Its grammar, which is being compiled. The scheduler does not know the request yet."""


@dataclass(frozen=True, slots=True)
class CensusEntry:
    """One live request at one moment."""

    id: RequestId
    status: RequestStatus
    kind: RequestKind
    tenant: str
    priority: int
    arrival_s: float
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    max_tokens: int
    num_preemptions: int
    blocking: Blocking | None
    """None for those that run."""
    num_ahead: int | None
    """How many are to start before it, by the order of now; None for those that run or are set aside, and where the
    policy has no order that can be told."""
    num_tokens_ahead: int | None
    """Tokens that those before it, running ones included, have yet to compute of what is known of them."""


@dataclass(frozen=True, slots=True)
class Census:
    """One tenant's requests, at most as many as were asked for: those that run, then the others as they go next."""

    tenant: str
    entries: tuple[CensusEntry, ...]
    num_running: int
    num_waiting: int
    """Queued and set aside."""
    num_preempted: int


def take_census(
    running: Iterable[RequestState],
    room: WaitingRoom,
    policy: Policy,
    *,
    tenant: str,
    most: int,
    blocking: Blocking,
    first_unseen: int,
) -> Census:
    """Count and describe the requests of ``tenant``, the first ``most`` of them one by one.

    ``blocking`` is what ended the last filling of seats; requests from serial ``first_unseen`` on came after it.
    """
    entries: list[CensusEntry] = []
    counts = dict.fromkeys(RequestStatus, 0)
    num_ahead = num_tokens_ahead = 0
    for state, is_ordered in _in_line(running, room, policy):
        is_waiting = state.status is not RequestStatus.RUNNING
        if state.tenant == tenant:
            counts[state.status] += 1
            if len(entries) < most:
                reason = _reason(state, room, blocking, first_unseen) if is_waiting else None
                ahead = (num_ahead, num_tokens_ahead) if is_waiting and is_ordered else (None, None)
                entries.append(_entry(state, reason, ahead))
        num_ahead += is_waiting
        num_tokens_ahead += state.num_pending_tokens
    return Census(
        tenant=tenant,
        entries=tuple(entries),
        num_running=counts[RequestStatus.RUNNING],
        num_waiting=counts[RequestStatus.WAITING],
        num_preempted=counts[RequestStatus.PREEMPTED],
    )


def with_compiling(census: Census, held_back: Iterable[Request], *, most: int) -> Census:
    """``census`` and those of ``held_back`` that are its tenant's, as waiting for their grammars."""
    own = [request for request in held_back if request.tenant == census.tenant]
    left = max(0, most - len(census.entries))
    entries = [_entry(RequestState(request, 0), Blocking.GRAMMAR, (None, None)) for request in own[:left]]
    return replace(census, entries=(*census.entries, *entries), num_waiting=census.num_waiting + len(own))


def _in_line(running: Iterable[RequestState], room: WaitingRoom, policy: Policy) -> Iterator[tuple[RequestState, bool]]:
    """Everybody, and whether the place of each is known."""
    for state in running:
        yield state, True
    for state in room.preempted():
        yield state, True
    waiting = room.waiting()
    queued = [state for state in waiting if not room.is_set_aside(state)]
    is_ordered = isinstance(policy, OrderedPolicy)
    if isinstance(policy, OrderedPolicy):
        queued.sort(key=policy.key)
    for state in queued:
        yield state, is_ordered
    for state in waiting:
        if room.is_set_aside(state):
            yield state, False


def _reason(state: RequestState, room: WaitingRoom, blocking: Blocking, first_unseen: int) -> Blocking:
    if room.is_set_aside(state):
        return Blocking.PREFIX
    return Blocking.NEXT_STEP if state.serial >= first_unseen else blocking


def _entry(state: RequestState, reason: Blocking | None, ahead: tuple[int, int] | tuple[None, None]) -> CensusEntry:
    return CensusEntry(
        id=state.id,
        status=state.status,
        kind=state.kind,
        tenant=state.tenant,
        priority=state.priority,
        arrival_s=state.arrival_s,
        num_prompt_tokens=state.num_prompt_tokens,
        num_computed_tokens=state.num_computed_tokens,
        num_output_tokens=state.num_output_tokens,
        max_tokens=state.request.stop.max_tokens,
        num_preemptions=state.num_preemptions,
        blocking=reason,
        num_ahead=ahead[0],
        num_tokens_ahead=ahead[1],
    )
