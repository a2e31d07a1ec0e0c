"""``WaitingRoom``: everybody who does not run, and who of them is next.

Three kinds of people wait here:

    preempted    they ran before and go first, oldest first; the policy is not asked
    queued       the policy orders them
    set aside    an equal prefix is being computed (see ``in_flight``); the policy does not see them meanwhile

Owns the ageing bound, which no policy can break: once ``max_overtakes`` later arrivals have left the room before
it, the head of the arrival order goes before the policy's choice and is not set aside any more. To leave is to
start or to give up; counting both, the bound is one subtraction (how many left, less how many came before), and
whoever is ahead ages first, so looking at the head is enough. It is counted in requests, not in seconds: it holds
on any machine and for any clock.

No operation walks over the waiting requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from heapq import heappop, heappush

from scheduler.errors import ProtocolError
from scheduler.in_flight import InFlightPrefixes
from scheduler.lifecycle import RequestStatus
from scheduler.policies.base import Policy
from scheduler.request import RequestId, RequestState


class WaitingRoom:
    """Who waits, and who is next."""

    def __init__(self, policy: Policy, in_flight: InFlightPrefixes, *, max_overtakes: int) -> None:
        self._policy = policy
        self._in_flight = in_flight
        self._max_overtakes = max_overtakes
        self._waiting: OrderedDict[RequestId, RequestState] = OrderedDict()
        self._preempted: list[tuple[int, RequestState]] = []
        self._num_preempted = 0
        self._num_entered = 0
        self._num_left = 0

    @property
    def num_waiting(self) -> int:
        """Queued and set aside, not the preempted."""
        return len(self._waiting)

    @property
    def num_queued(self) -> int:
        """Waiting, and not set aside."""
        return len(self._waiting) - len(self._in_flight)

    @property
    def num_preempted(self) -> int:
        return self._num_preempted

    def waiting(self) -> tuple[RequestState, ...]:
        """Queued and set aside, in order of arrival."""
        return tuple(self._waiting.values())

    def preempted(self) -> tuple[RequestState, ...]:
        """Preempted requests, oldest first."""
        live = (entry for entry in self._preempted if entry[1].status is RequestStatus.PREEMPTED)
        return tuple(state for _, state in sorted(live, key=lambda entry: entry[0]))

    def enter(self, state: RequestState) -> None:
        """A new request queues."""
        # All who entered before it may leave before it by right; ``max_overtakes`` counts the others.
        state.overtake_limit = self._num_entered + self._max_overtakes
        self._num_entered += 1
        self._waiting[state.id] = state
        self._policy.enqueue(state)

    def enter_preempted(self, state: RequestState) -> None:
        """A preempted request waits to resume."""
        heappush(self._preempted, (state.serial, state))
        self._num_preempted += 1

    def leave(self, state: RequestState) -> None:
        """The request runs now, or ended. Its status has not been changed yet."""
        if state.status is RequestStatus.PREEMPTED:
            self._num_preempted -= 1  # its heap entry is dropped when it surfaces
            return
        del self._waiting[state.id]
        self._num_left += 1
        if state.id in self._in_flight:
            self._in_flight.withdraw(state.id)
        else:
            self._policy.remove(state)

    def set_aside(self, state: RequestState, block_hash: bytes) -> None:
        """The policy shall not see it until the block with this hash is published, or nobody computes it."""
        self._policy.remove(state)
        self._in_flight.set_aside(state, block_hash)

    def hand_back(self, states: Iterable[RequestState]) -> None:
        """These were set aside and may go on."""
        for state in states:
            self._policy.enqueue(state)

    def is_set_aside(self, state: RequestState) -> bool:
        """Whether it waits for an equal prefix that is being computed."""
        return state.id in self._in_flight

    def is_aged(self, state: RequestState) -> bool:
        """Whether nobody may overtake it any more."""
        return self._num_left >= state.overtake_limit

    def next(self, now: float, *, idle: bool) -> RequestState | None:
        """Who should start next; None if nobody should now.

        ``idle``: nothing runs. Then somebody must start, whatever the policy prefers.

        Raises:
            ProtocolError: the policy named a request that does not wait.
        """
        while self._preempted:
            state = self._preempted[0][1]
            if state.status is RequestStatus.PREEMPTED:
                return state
            heappop(self._preempted)
        if not self._waiting:
            return None
        head = next(iter(self._waiting.values()))
        if self.is_aged(head):
            return head
        choice = self._policy.peek(now)
        if choice is None:
            return head if idle else None
        chosen = self._waiting.get(choice.id)
        if chosen is None or chosen.id in self._in_flight:
            raise ProtocolError(f"the policy named {choice.id!r}, which does not queue")
        return chosen
