"""``Scheduler``: continuous batching, in one page of rules.

A model is fast when many requests share a forward pass, and requests come and go at any moment. So the batch
is decided anew at every step. The driver repeats::

    plan   = scheduler.step(now)        # who computes which tokens
    result = runner.run(plan)           # the model does it
    events = scheduler.commit(result, now)

How a step is planned:

1.  A request is two numbers: tokens known, tokens computed (``scheduler.request``). The step gives it tokens
    until they are equal. Decoding is one token behind; a fresh prompt is many behind and is worked off in
    chunks of what the budget leaves.
2.  Running requests come first, decodes before prompts. The budget is at least the number of seats, so no
    decode ever waits for somebody's prompt.
3.  When blocks run out, the policy names a victim: it gives its blocks back and is computed again later,
    mostly from the prefix cache. Never the oldest running request; and a request preempted ``max_preemptions``
    times comes back with all blocks it can ever need pledged to it. So some request always advances, and
    every request ends.
4.  If nobody was preempted, seats are filled: preempted requests first, then an aged one, then the policy's
    choice. One starts only if its whole prompt fits beside what the others still need for theirs, so that
    admission does not cause preemption. The first that does not fit ends the round: no one slips past it.
5.  A prompt starts behind its longest cached prefix. If another request is computing the next block of that
    prefix right now, the request is set aside until it can be found in the cache.

``commit`` advances the numbers, publishes full blocks, appends sampled tokens and ends requests. Blocks are
published only here: what a failed or forgotten step wrote is never found by anybody.

Owns every ``RequestState``. Sans-IO: no clock, no thread, no randomness, no logging; the laws it keeps are
written in ``docs/laws.md`` and checked by ``scheduler.invariants``. Rejected: separate prefill and decode
queues (two copies of every rule), scheduling ahead of the result (planning costs too little to pay for the
races), swapping blocks out (recomputing from the cache is cheaper than moving memory on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.accountant import MemoryAccountant, request_bytes
from scheduler.census import Blocking, Census, take_census
from scheduler.config import SchedulerConfig
from scheduler.deadlines import Deadlines
from scheduler.draft import StepDraft
from scheduler.errors import DuplicateRequestError, ProtocolError, QueueFullError, RequestTooLargeError
from scheduler.events import Admitted, BlockEvicted, Event, Finished, Preempted, PrefixHit, Resumed
from scheduler.in_flight import InFlightPrefixes
from scheduler.kv_cache_manager import KVCacheManager
from scheduler.lifecycle import FinishReason, RequestStatus, move
from scheduler.outcome import apply_result, validate_result
from scheduler.plan import StepPlan, StepResult
from scheduler.policies.base import Policy
from scheduler.prefix_cache import HashFunction, sha256_digest
from scheduler.prefix_sharing import PrefixSharing
from scheduler.request import BlockId, Request, RequestId, RequestState
from scheduler.stats import SchedulerStats
from scheduler.waiting_room import WaitingRoom


class Scheduler:
    """Decides at every step which tokens of which requests are computed. Single-threaded."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        *,
        accountant: MemoryAccountant | None = None,
        hash_function: HashFunction = sha256_digest,
    ) -> None:
        """``accountant`` is charged for each live request's structures; without one, only counts bound them."""
        self.config = config
        self._accountant = accountant
        self._policy = policy
        self._kv = KVCacheManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            cache_seed=config.cache_seed,
            hash_function=hash_function,
        )
        self._in_flight = InFlightPrefixes()
        self._sharing = PrefixSharing(config, self._kv, self._in_flight)
        self._room = WaitingRoom(policy, self._in_flight, max_overtakes=config.max_overtakes)
        self._states: dict[RequestId, RequestState] = {}
        self._running: dict[RequestId, RequestState] = {}
        self._deadlines = Deadlines()
        self._open_plan: StepPlan | None = None
        self._next_serial = 0
        self._num_steps = 0
        self._blocking = Blocking.NEXT_STEP
        self._num_seen = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is live."""
        return bool(self._states)

    def add(self, request: Request, now: float) -> None:  # noqa: ARG002 - every entrance takes the time
        """Accept a request. From here on it ends in exactly one ``Finished``.

        Raises:
            DuplicateRequestError: the id is live.
            RequestTooLargeError: prompt plus output could never fit, even alone.
            QueueFullError: ``max_waiting`` requests wait already.
            MemoryFullError: the accountant has no room for its structures.
        """
        if request.id in self._states:
            raise DuplicateRequestError(f"request {request.id!r} is live")
        limit = self.config.max_tokens_per_request
        if request.max_total_tokens > limit:
            raise RequestTooLargeError(request.max_total_tokens, limit)
        if self._room.num_waiting >= self.config.max_waiting:
            raise QueueFullError(self.config.max_waiting)
        state = RequestState(request, self._next_serial)
        if self._accountant is not None:
            size = request_bytes(len(request.prompt), request.stop.max_tokens, self.config.block_size)
            state.reservation = self._accountant.reserve("requests", size + request.extra_bytes)
        self._next_serial += 1
        self._states[request.id] = state
        self._room.enter(state)
        self._deadlines.add(state)

    def finish(self, request_id: RequestId, reason: FinishReason, *, error: str | None = None) -> tuple[Event, ...]:
        """End a request wherever it is; its blocks are free at once. Unknown and ended ids are fine: no events."""
        state = self._states.get(request_id)
        if state is None:
            return ()
        return self._observed([self._end(state, reason, error=error)])

    def step(self, now: float) -> StepPlan:
        """Plan the next step. Must be followed by ``commit``.

        Raises:
            ProtocolError: the plan before was not committed.
        """
        if self._open_plan is not None:
            raise ProtocolError(f"step {self._open_plan.step_id} was not committed")
        draft = StepDraft(self.config.max_num_batched_tokens)
        draft.events.extend(self._end(state, FinishReason.DEADLINE) for state in self._deadlines.overdue(now))
        self._deadlines.tidy(num_live=len(self._states))
        preempted = self._schedule_running(draft, now)
        self._blocking = Blocking.PREEMPTION if preempted else self._fill_seats(draft, now)
        self._num_seen = self._next_serial
        draft.events.extend(map(BlockEvicted, self._kv.take_evicted()))
        self._open_plan = draft.plan(self._num_steps)
        self._observed(self._open_plan.events)
        return self._open_plan

    def commit(self, result: StepResult, now: float) -> tuple[Event, ...]:  # noqa: ARG002 - as for add
        """Take in what came of the open plan. Requests that ended since ``step`` are passed over.

        Raises:
            ProtocolError: no plan is open, or the result does not fit it. Nothing changed.
        """
        plan = self._open_plan
        if plan is None:
            raise ProtocolError("no step to commit")
        validate_result(plan, result)
        self._open_plan = None
        self._num_steps += 1
        events: list[Event] = []
        for scheduled, outcome in zip(plan.slices, result.results, strict=True):
            state = self._running.get(scheduled.request_id)
            if state is None:
                continue
            reason = apply_result(state, scheduled, outcome, events)
            if reason is not FinishReason.ERROR:
                published = self._kv.publish(state)
                if published:
                    self._room.hand_back(self._in_flight.published(state.id, published))
                if not state.publishing:  # nobody shall wait for blocks that stay private
                    self._room.hand_back(self._in_flight.dissolve(state.id))
            if reason is not None:
                events.append(self._end(state, reason, error=outcome.error))
        return self._observed(events)

    def stats(self) -> SchedulerStats:
        """A snapshot."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=self._room.num_waiting,
            num_set_aside=len(self._in_flight),
            num_preempted=self._room.num_preempted,
            num_blocks=self.config.num_blocks - 1,
            num_used_blocks=self._kv.pool.num_used,
            num_pledged_blocks=self._kv.pool.num_free - self._kv.num_available,
            num_cached_blocks=len(self._kv.cache),
            num_steps=self._num_steps,
            num_reserved_bytes=0 if self._accountant is None else self._accountant.reserved_bytes,
        )

    def census(self, tenant: str, most: int) -> Census:
        """The requests of ``tenant``, the first ``most`` one by one, and what those that wait are waiting for."""
        return take_census(
            self._running.values(),
            self._room,
            self._policy,
            tenant=tenant,
            most=most,
            blocking=self._blocking,
            first_unseen=self._num_seen,
        )

    def drop_unheld_prefixes(self) -> int:
        """Forget the cached blocks that no request holds. Returns how many there were."""
        return self._kv.cache.drop_unheld()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, if no request holds a block; False and no change otherwise."""
        return self._kv.cache.reset()

    # Planning

    def _schedule_running(self, draft: StepDraft, now: float) -> bool:
        """Rules 1 to 3. Returns whether somebody was preempted."""
        num_events = len(draft.events)
        for state in sorted(self._running.values(), key=_is_behind_by_more_than_one):
            if draft.budget == 0:
                break
            if state.status is RequestStatus.RUNNING:
                num_tokens = self._make_room(state, self._grant(state, draft.budget), draft, now)
                if num_tokens:
                    draft.schedule(state, num_tokens)
        return len(draft.events) > num_events

    def _grant(self, state: RequestState, budget: int) -> int:
        """Tokens the request should get: what it lacks, within budget, chunk limit and the policy's wish."""
        pending = state.num_pending_tokens
        if pending == 1:
            return 1  # a decode: there is nothing to ask
        most = min(pending, budget, self.config.max_prefill_chunk or budget)
        return max(1, min(self._policy.grant(state, most), most))

    def _make_room(self, state: RequestState, wanted: int, draft: StepDraft, now: float) -> int:
        """Reserve blocks for ``wanted`` more tokens, or as many as can be had; 0 if the request must pause."""
        while not self._kv.reserve(state, state.num_computed_tokens + wanted):
            possible = self._kv.capacity(state) - state.num_computed_tokens
            if possible > 0:
                wanted = min(wanted, possible)
                continue
            victim = self._victim(now)
            if victim is None:
                return 0
            self._preempt(victim, draft)
            if victim is state:
                return 0
        return wanted

    def _victim(self, now: float) -> RequestState | None:
        """Whom to preempt: the policy's choice among those the livelock guard leaves. None: nobody may be."""
        by_age = sorted(self._running.values(), key=lambda state: state.serial)
        candidates = [state for state in by_age[1:] if state.num_preemptions < self.config.max_preemptions]
        if not candidates:
            return None
        chosen = self._states.get(self._policy.victim(candidates, now).id)
        if chosen is None or chosen not in candidates:
            raise ProtocolError("the policy named a victim that it was not offered")
        return chosen

    def _preempt(self, state: RequestState, draft: StepDraft) -> None:
        draft.withdraw(state)
        draft.events.append(Preempted(state.id, state.num_computed_tokens))
        del self._running[state.id]
        self._kv.release(state)
        state.embedding = None
        state.num_preemptions += 1
        move(state, RequestStatus.PREEMPTED)
        self._room.enter_preempted(state)
        self._room.hand_back(self._in_flight.dissolve(state.id))

    def _fill_seats(self, draft: StepDraft, now: float) -> Blocking:
        """Rules 4 and 5. Returns what those that are left wait for."""
        num_set_aside = 0
        num_owed: int | None = None  # counted when somebody could start, then kept up
        while draft.budget and len(self._running) < self.config.max_num_seqs:
            state = self._room.next(now, idle=not self._running)
            if state is None:
                return Blocking.POLICY if self._room.num_queued else Blocking.NEXT_STEP
            cached = self._sharing.cached(state)
            awaited = None if self._room.is_aged(state) else self._sharing.awaited(state, len(cached))
            if awaited is not None:
                # One round sets aside at most as many as it could have seated: a step's cost stays
                # bounded by what runs, not by how many equal prompts wait.
                if num_set_aside == self.config.max_num_seqs:
                    return Blocking.NEXT_STEP
                num_set_aside += 1
                self._room.set_aside(state, awaited)
                continue
            if num_owed is None:
                num_owed = sum(map(self._blocks_owed, self._running.values()))
            if not self._fits(state, cached, num_owed):
                return Blocking.BLOCKS
            self._start(state, cached, draft, now)
            num_owed += self._blocks_owed(state)
        return Blocking.TOKEN_BUDGET if len(self._running) < self.config.max_num_seqs else Blocking.SEATS

    def _blocks_to_start(self, state: RequestState) -> int:
        """Blocks the request must be sure of when it starts: its known tokens and the next one, or, after
        ``max_preemptions`` preemptions, everything it can ever hold."""
        if state.num_preemptions >= self.config.max_preemptions:
            return self._kv.num_blocks_for(state.request.max_total_tokens)
        return self._kv.num_blocks_for(min(state.num_tokens + 1, state.request.max_total_tokens))

    def _blocks_owed(self, state: RequestState) -> int:
        """Blocks that a running request still has to get for its known tokens; a pledge is owed already."""
        if state.num_preemptions >= self.config.max_preemptions:
            return 0
        return max(0, self._kv.num_blocks_for(state.num_tokens) - len(state.block_table))

    def _fits(self, state: RequestState, cached: Sequence[BlockId], num_owed: int) -> bool:
        """Whether the request can start without taking blocks that others need to finish their prompts."""
        if not self._running:
            return True  # alone, everything that ``add`` accepted fits
        needed = self._blocks_to_start(state) - len(cached) + self._kv.num_free_among(cached)
        return needed + num_owed <= self._kv.num_available

    def _start(self, state: RequestState, cached: Sequence[BlockId], draft: StepDraft, now: float) -> None:
        resumed = state.status is RequestStatus.PREEMPTED
        self._room.leave(state)
        move(state, RequestStatus.RUNNING)
        self._running[state.id] = state
        self._kv.adopt(state, cached)
        if state.num_preemptions >= self.config.max_preemptions:
            self._kv.pledge(state, self._blocks_to_start(state) - len(cached))
        self._sharing.lead(state, len(cached))
        if resumed:
            draft.events.append(Resumed(state.id))
        else:
            state.num_cached_tokens = state.num_computed_tokens
            draft.events.append(Admitted(state.id, state.num_prompt_tokens, max(0.0, now - state.arrival_s)))
        draft.events.append(PrefixHit(state.id, state.num_tokens, state.num_computed_tokens, first=not resumed))
        num_tokens = self._grant(state, draft.budget)
        reserved = self._kv.reserve(state, state.num_computed_tokens + num_tokens)
        assert reserved, "what fits can be reserved"
        draft.schedule(state, num_tokens)

    # Endings

    def _end(self, state: RequestState, reason: FinishReason, *, error: str | None = None) -> Finished:
        """Take a live request out of every structure."""
        del self._states[state.id]
        if state.status is RequestStatus.RUNNING:
            del self._running[state.id]
            self._kv.release(state, poisoned=reason is FinishReason.ERROR)
            self._room.hand_back(self._in_flight.dissolve(state.id))
        else:
            self._room.leave(state)
        if self._accountant is not None and state.reservation is not None:
            self._accountant.release(state.reservation)
        move(state, RequestStatus.FINISHED)
        return Finished(
            state.id,
            reason,
            num_output_tokens=state.num_output_tokens,
            num_cached_tokens=state.num_cached_tokens or 0,
            error=error,
            embedding=state.embedding if reason is FinishReason.STOP else None,
        )

    def _observed(self, events: Sequence[Event]) -> tuple[Event, ...]:
        if events:
            self._policy.observe(events)
        return tuple(events)


def _is_behind_by_more_than_one(state: RequestState) -> bool:
    return state.num_pending_tokens > 1
