"""``World``: one scheduler, one honest runner, one clock, and the laws that hold between moments.

Owns the history that laws need and a single look cannot give: what each request has been sent so far, how it
should end, who was oldest, how many admissions overtook whom. Every move checks the laws it can; ``settle``
runs the world until nobody lives and checks the rest.

Used by the state machine in ``scheduler.testing.machine``, by replays, and by hand-written tests.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from scheduler import invariants
from scheduler.accountant import MemoryAccountant
from scheduler.config import SchedulerConfig
from scheduler.errors import AdmissionError, QueueFullError, RequestTooLargeError
from scheduler.events import (
    Admitted,
    Event,
    Finished,
    Preempted,
    PrefixHit,
    PromptScored,
    Resumed,
    TokenLogprob,
    TokensCommitted,
)
from scheduler.invariants import InvariantError
from scheduler.lifecycle import FinishReason
from scheduler.plan import StepPlan, StepResult
from scheduler.policies.base import Policy
from scheduler.prefix_cache import HashFunction, sha256_digest
from scheduler.request import TOKEN_TYPECODE, Request, RequestId
from scheduler.scheduler import Scheduler
from scheduler.sim.clock import VirtualClock
from scheduler.testing.fake_runner import Fault, HonestModel, KVHonestRunner, StepCrash, reference_output
from scheduler.testing.reach import Reach

_REFUSALS: Final = {RequestTooLargeError: "too large", QueueFullError: "queue full"}


@dataclass(slots=True)
class History:
    """What has been seen of one request."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_overtakes_allowed: int = 0
    started: bool = False
    stop_forced: bool = False
    finished: Finished | None = None


class World:
    """Drives a scheduler and checks the laws. Every method that moves returns the events it caused."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        *,
        hash_function: HashFunction = sha256_digest,
        budget_bytes: int = 10**9,
    ) -> None:
        self.config = config
        self.clock = VirtualClock()
        self.accountant = MemoryAccountant(budget_bytes)
        self.scheduler = Scheduler(config, policy, accountant=self.accountant, hash_function=hash_function)
        self.model = HonestModel()
        self.runner = KVHonestRunner(config.num_blocks, config.block_size, self.model)
        self.histories: dict[RequestId, History] = {}
        self.trace: list[Event] = []
        self.reach = Reach()

    @property
    def live(self) -> list[RequestId]:
        """Requests that have not ended, in order of arrival."""
        return [request_id for request_id, history in self.histories.items() if history.finished is None]

    def add(self, request: Request) -> bool:
        """Hand a request in; False if it was refused. A refusal must change nothing (I8) and be just (I19)."""
        before = (self.scheduler.stats(), self.accountant.stats())
        try:
            self.scheduler.add(request, self.clock())
        except AdmissionError as refusal:
            self.reach.refused(_REFUSALS.get(type(refusal), "memory full"))
            _require("I8", (self.scheduler.stats(), self.accountant.stats()) == before, "a refusal changed something")
            return False
        fits = request.max_total_tokens <= self.config.max_tokens_per_request
        _require("I19", fits, "a request that can never fit was accepted")
        self.histories[request.id] = History(request, num_overtakes_allowed=self.config.max_overtakes)
        invariants.check(self.scheduler)
        return True

    def finish(self, request_id: RequestId, reason: FinishReason = FinishReason.CANCELLED) -> tuple[Event, ...]:
        """End a request from outside: legal in every state, any number of times (I24)."""
        was_live = request_id in self.live
        events = self.scheduler.finish(request_id, reason)
        _require("I24", len(events) == int(was_live), "ending a request must say so exactly once")
        self.see(events)
        invariants.check(self.scheduler)
        return events

    def step(
        self,
        faults: Mapping[RequestId, Fault] | None = None,
        *,
        crash_after: int | None = None,
        finish_in_flight: Sequence[RequestId] = (),
    ) -> tuple[Event, ...]:
        """One step: plan, run, commit. ``finish_in_flight`` are cancelled between run and commit."""
        had_work = self.scheduler.has_work
        oldest = self._oldest_running()
        decoding = {state.id for state in self.scheduler._running.values() if state.num_pending_tokens == 1}
        self.reach.before_step(self.scheduler)
        plan = self.scheduler.step(self.clock())
        self.see(plan.events)
        invariants.check(self.scheduler)
        invariants.check_plan(self.scheduler, plan)
        self._check_progress(plan, had_work, oldest)
        self._check_streams(plan, decoding)
        self.reach.planned(self.scheduler, plan)
        result = self._run(plan, faults or {}, crash_after)
        for request_id in finish_in_flight:
            self.finish(request_id)
        events = self.scheduler.commit(result, self.clock())
        self.see(events)
        invariants.check(self.scheduler)
        self.reach.committed(self.scheduler, events)
        return (*plan.events, *events)

    def reset_prefix_cache(self) -> bool:
        """Forget all prefixes: succeeds exactly when nobody holds a block (I15)."""
        idle = self.scheduler.stats().num_used_blocks == 0
        done = self.scheduler.reset_prefix_cache()
        _require("I15", done is idle, "the cache was reset under a running request, or refused when idle")
        invariants.check(self.scheduler)
        return done

    def drop_unheld_prefixes(self) -> int:
        """Forget what nobody holds: what stays cached is held."""
        dropped = self.scheduler.drop_unheld_prefixes()
        stats = self.scheduler.stats()
        _require("I15", stats.num_cached_blocks <= stats.num_used_blocks, "an unheld block stayed in the cache")
        invariants.check(self.scheduler)
        return dropped

    def settle(self) -> None:
        """Step without faults until nobody lives: everyone ends in bounded time (I21), nothing is left (I29, I32)."""
        bound = self.steps_to_settle()
        while self.scheduler.has_work:
            _require("I21", bound > 0, "requests did not end in time")
            bound -= 1
            self.step()
        invariants.check(self.scheduler)
        _require("I29", not self.live, "a request was forgotten")
        _require("I32", self.accountant.stats().reserved_bytes == 0, "a reservation outlived its request")
        _require("I15", self.scheduler.reset_prefix_cache(), "an idle cache cannot be reset")
        _require("I15", self.scheduler.stats().num_cached_blocks == 0, "a reset cache is not empty")

    def steps_to_settle(self) -> int:
        """The bound of law I21 for those who live now."""
        work = sum(len(history.request.prompt) + history.request.stop.max_tokens for history in self._live_histories())
        return (work + 1) * (1 + self.config.max_preemptions) + 1

    # Laws between moments

    def _live_histories(self) -> list[History]:
        return [history for history in self.histories.values() if history.finished is None]

    def _oldest_running(self) -> RequestId | None:
        running = [h.request.id for h in self._live_histories() if h.started]
        return next((r for r in running if r in self.scheduler._running), None)

    def _run(self, plan: StepPlan, faults: Mapping[RequestId, Fault], crash_after: int | None) -> StepResult:
        try:
            result = self.runner.run(plan, faults, crash_after=crash_after)
        except StepCrash:
            return StepResult.failed(plan, "the runner crashed")
        for scheduled, outcome in zip(plan.slices, result.results, strict=True):
            if outcome.finish is FinishReason.STOP:
                self.histories[scheduled.request_id].stop_forced = True
        return result

    def _check_progress(self, plan: StepPlan, had_work: bool, oldest: RequestId | None) -> None:
        ended = any(isinstance(event, Finished) for event in plan.events)
        _require("I20", not had_work or bool(plan.slices) or ended, "requests live, but the step does nothing")
        preempted = {event.request_id for event in plan.events if isinstance(event, Preempted)}
        _require("I22", oldest not in preempted, "the oldest running request was preempted")

    def _check_streams(self, plan: StepPlan, decoding: Set[RequestId]) -> None:
        stalled = (decoding & set(self.scheduler._running)) - {scheduled.request_id for scheduled in plan.slices}
        _require("I20", not stalled or self.scheduler._kv.num_available == 0, f"{stalled} stall though blocks are free")

    def see(self, events: Sequence[Event]) -> None:
        """Take note of events, and refuse a history that cannot be (I11, I17, I22, I23, I25, I27)."""
        self.trace.extend(events)
        for event in events:
            request_id = getattr(event, "request_id", None)
            if request_id is None:
                continue
            history = self.histories[request_id]
            _require("I27", history.finished is None, f"{event} comes after the end")
            self._see_one(history, event)

    def _see_one(self, history: History, event: Event) -> None:
        match event:
            case Admitted():
                _require("I17", not history.started, "a request started twice")
                history.started = True
                self._count_overtakes(history)
            case Preempted():
                history.num_preemptions += 1
                _require("I22", history.num_preemptions <= self.config.max_preemptions, "preempted too often")
            case Resumed():
                _require("I17", history.num_preemptions > 0, "resumed without having been preempted")
            case PrefixHit(num_queried_tokens=queried, num_hit_tokens=hit, first=first):
                if first:
                    history.num_cached_tokens = hit
                _require("I11", 0 <= hit <= queried - 1, "a hit leaves no token to compute")
                _require("I11", hit % self.config.block_size == 0, "a hit covers part of a block")
            case TokensCommitted(output_index=index, token_id=token_id, logprob=logprob):
                _require("I27", index == len(history.token_ids), "an output index is missing or repeated")
                history.token_ids.append(token_id)
                history.logprobs.append(logprob)
            case PromptScored(first_position=first, logprobs=logprobs):
                _require("I27", first == len(history.prompt_logprobs) + 1, "a prompt position is missing or repeated")
                history.prompt_logprobs.extend(logprobs)
            case _:
                assert isinstance(event, Finished), "no other event names a request"
                history.finished = event
                self._check_output(history, event)

    def _count_overtakes(self, admitted: History) -> None:
        """I23: whoever waited longer than the one who starts was overtaken once more."""
        arrival = list(self.histories)
        position = arrival.index(admitted.request.id)
        for request_id in arrival[:position]:
            history = self.histories[request_id]
            if history.finished is None and not history.started:
                history.num_overtakes_allowed -= 1
                _require("I23", history.num_overtakes_allowed >= 0, f"{request_id!r} was overtaken too often")

    def _check_output(self, history: History, finished: Finished) -> None:
        """I25: the output is what the prompt alone determines; cut short, it is a prefix of that."""
        reference = reference_output(self.model, history.request)
        got = tuple(history.token_ids)
        _require("I25", got == reference.token_ids[: len(got)], "the output differs from the reference")
        _require("I25", tuple(history.logprobs) == reference.logprobs[: len(got)], "a log-probability differs")
        scored = tuple(history.prompt_logprobs)
        _require("I25", scored == reference.prompt_logprobs[: len(scored)], "a prompt log-probability differs")
        _require("I27", finished.num_output_tokens == len(got), "the end miscounts the output")
        _require("I27", finished.num_cached_tokens == history.num_cached_tokens, "the end miscounts the first hit")
        if finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
            _require("I25", scored == reference.prompt_logprobs, "prompt log-probabilities are missing")
            _require("I25", finished.embedding == reference.embedding, "the embedding differs")
            if not history.stop_forced:
                _require("I25", got == reference.token_ids, "the output is incomplete")
                _require("I25", finished.reason is reference.reason, "it ended for another reason")


def compact(tokens: Sequence[int]) -> array[int]:
    """Token ids in the form that requests hold them."""
    return array(TOKEN_TYPECODE, tokens)


def _require(law: str, holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(law, message)
