"""``EngineCore``: the engine without a process. Commands in, ``tick()``, one message out.

Owns the ``Scheduler``, the ``Runner`` and the outputs, and is where a step happens::

    plan   = scheduler.step(now)
    result = runner.run(batch)          # a failure ends the requests of this plan, and only those
    result = outputs.decide(...)        # stop strings, before anything is committed
    events = scheduler.commit(result)
    -> Tick(deltas, stats, timing)

No thread, no loop, no I/O, no clock but the one it is given. The same core runs inside the engine process and
in tests.

Between steps it looks at memory (``MemoryWatch``): under pressure cached prefixes that nobody holds are forgotten, and
what is submitted is refused.

Invariants: every ``Submit`` is answered by exactly one delta with a finish reason, and nothing about it
follows. What goes wrong with one request (its admission, its text, its logits) ends that request; what goes
wrong with a step ends the requests of that step. A defect of the scheduler (``ProtocolError`` and its kin) is
not contained: it leaves through ``tick`` and takes the process down, because a scheduler that contradicts
itself must not go on serving.

Rejected: planning the next step while this one runs (a plan costs some percent of a step, and every cancel
and stop string would race with it).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Final, NamedTuple

from mixtral_serve.contract import ModelInfo, RunBatch, Runner, SamplingParams
from mixtral_serve.engine.admission import check_token_ids, decode_prompt
from mixtral_serve.engine.errors import MemoryPressure, RequestRefused
from mixtral_serve.engine.grammars import POLL_S, Grammars
from mixtral_serve.engine.memory import MemoryWatch
from mixtral_serve.engine.messages import (
    Cancel,
    Command,
    EngineMemory,
    EngineStats,
    Inspect,
    StepTiming,
    Submit,
    Tick,
)
from mixtral_serve.engine.outputs import Outputs, RequestOutput
from mixtral_serve.engine.parameters import check_parameters, extra_bytes, sampling_of
from mixtral_serve.text.detokenizer import TokenBytes
from mixtral_serve.text.grammar_vocabulary import MATCHER_BYTES, Matcher, Vocabulary
from scheduler.census import Census, with_compiling
from scheduler.errors import AdmissionError, DuplicateRequestError
from scheduler.events import Admitted, Event, Finished, Preempted, PrefixHit, TokensCommitted
from scheduler.lifecycle import FinishReason
from scheduler.plan import StepPlan, StepResult
from scheduler.request import Request, RequestId, StopRule
from scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)

MAX_IDLE_STEPS: Final = 8
"""So many steps in a row that did nothing although requests live mean a scheduler that hangs."""


class EngineCore:
    """One engine: a scheduler, a runner and the texts of the live requests. Single-threaded."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        table: TokenBytes,
        *,
        memory: MemoryWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_failed_steps: int = 16,
        compiler: Executor | None = None,
    ) -> None:
        """``memory`` None: nobody watches it. ``max_failed_steps``: after so many failed steps in a row the runner
        counts as broken. ``compiler`` compiles grammars; None: a thread of our own."""
        self._scheduler = scheduler
        self._runner = runner
        self._memory = memory
        self._clock = clock
        self._outputs = Outputs(table)
        self._sampling: dict[RequestId, SamplingParams] = {}
        self._eos_token_ids = frozenset(runner.info.eos_token_ids)
        self._grammars: Grammars[_Prepared] = Grammars(
            lambda: Vocabulary(table, eos_token_ids=runner.info.eos_token_ids, vocab_size=runner.info.vocab_size),
            compiler=compiler,
        )
        self._vocab_size = runner.info.vocab_size
        self._counters = _Counters()
        self._max_failed_steps = max_failed_steps
        self._num_failed_in_a_row = 0
        self._num_idle_in_a_row = 0
        self._is_shut_down = False
        self._has_news = False
        self._inspections: dict[str, Inspect] = {}

    @property
    def has_work(self) -> bool:
        """Whether ``tick`` has anything to do or to say."""
        has_news = self._has_news or bool(self._inspections) or self._grammars.has_ready
        return self._scheduler.has_work or self._outputs.has_deltas or has_news

    @property
    def wait_s(self) -> float | None:
        """How long ``tick`` need not be called, as things are; None: until a command comes."""
        if self.has_work:
            return 0.0
        if self._grammars.compiling_ids:
            return POLL_S
        return self._memory.period_s if self._memory is not None and self._memory.is_under_pressure else None

    @property
    def is_shut_down(self) -> bool:
        """A ``Shutdown`` came: all requests have ended; one more ``tick`` tells of it."""
        return self._is_shut_down

    @property
    def is_broken(self) -> bool:
        """The runner failed so often in a row that only a fresh process can help."""
        return self._num_failed_in_a_row >= self._max_failed_steps

    def handle(self, commands: Iterable[Command]) -> None:
        """Take in commands. Their consequences are told by the next ``tick``."""
        for command in commands:
            if isinstance(command, Submit):
                self._submit(command)
            elif isinstance(command, Cancel):
                self._finish(command.request_id, FinishReason.CANCELLED)
            elif isinstance(command, Inspect):
                self._inspections[command.tenant] = command
            else:
                self._is_shut_down = True
                for request_id in (*self._outputs.live_ids, *self._grammars.compiling_ids):
                    self._finish(request_id, FinishReason.CANCELLED)

    def tick(self) -> Tick | None:
        """Run one step and say what came of it. None when there is nothing to do and nothing to say.

        Raises:
            SchedulerError: a defect; the engine must not go on.
        """
        if self._memory is not None and self._memory.observe(self._clock(), shed=self._scheduler.drop_unheld_prefixes):
            self._has_news = True
            _log.warning("memory: %s", "pressure, requests are refused" if self._is_pressed else "pressure is over")
        self._end_overdue_compiling()
        if not self.has_work:
            return None
        self._has_news = False
        for ready in self._grammars.take_ready():
            self._add(ready.held, ready.matcher, ready.error)
        timing = self._step() if self._scheduler.has_work else None
        deltas = self._outputs.take()
        inspections, self._inspections = self._inspections.values(), {}
        censuses = tuple([self._census(asked) for asked in inspections])
        return Tick(deltas=deltas, stats=self._stats(), timing=timing, censuses=censuses)

    def close(self) -> None:
        """Let the side threads end; nothing may follow."""
        self._grammars.close()

    def _end_overdue_compiling(self) -> None:
        """The deadlines of those that the scheduler has not heard of."""
        for held in self._grammars.held:
            deadline_s = held.request.deadline_s
            if deadline_s is not None and deadline_s <= self._clock():
                self._finish(held.request.id, FinishReason.DEADLINE)

    def _census(self, asked: Inspect) -> Census:
        census = self._scheduler.census(asked.tenant, asked.most)
        return with_compiling(census, [held.request for held in self._grammars.held], most=asked.most)

    @property
    def _is_pressed(self) -> bool:
        return self._memory is not None and self._memory.is_under_pressure

    def _submit(self, submit: Submit) -> None:
        if self._is_pressed:
            self._outputs.refuse(submit.request_id, "memory pressure", MemoryPressure.__name__)
            return
        try:
            request = self._request(submit)
            output = self._outputs.prepare(submit, request.stop)
        except (AdmissionError, RequestRefused) as refusal:
            self._outputs.refuse(submit.request_id, str(refusal), type(refusal).__name__)
            return
        except Exception as error:  # noqa: BLE001 - a field that nobody refused before us ends its request alone
            _log.exception("request %s could not be started", submit.request_id)
            self._outputs.refuse(submit.request_id, f"it could not be started: {error!r}", None)
            return
        prepared = _Prepared(request, output, sampling_of(submit, request.stop))
        if request.id in self._sampling or submit.request_id in self._grammars.compiling_ids:
            self._outputs.refuse(submit.request_id, "its id is taken", DuplicateRequestError.__name__)
        elif submit.grammar is None:
            self._add(prepared)
        else:
            self._grammars.start(submit.request_id, submit.grammar, prepared)

    def _add(self, prepared: _Prepared, matcher: Matcher | None = None, error: str | None = None) -> None:
        """To the scheduler with it; where ``error`` says why it cannot start, to its end."""
        request_id = prepared.request.id
        if error is not None:
            self._outputs.refuse(request_id, error, None)
            return
        try:
            self._scheduler.add(prepared.request, self._clock())
        except AdmissionError as refusal:
            self._outputs.refuse(request_id, str(refusal), type(refusal).__name__)
            return
        self._outputs.open(request_id, prepared.output)
        self._sampling[request_id] = prepared.sampling
        if matcher is not None:
            self._grammars.open(request_id, matcher)

    def _request(self, submit: Submit) -> Request:
        prompt = decode_prompt(submit.prompt)
        check_token_ids(prompt, submit.stop_token_ids, self._vocab_size)
        check_parameters(submit.sampling, self._vocab_size)
        stop_token_ids = frozenset(submit.stop_token_ids)
        return Request(
            id=RequestId(submit.request_id),
            prompt=prompt,
            stop=StopRule(
                max_tokens=submit.max_tokens,
                stop_token_ids=stop_token_ids if submit.ignore_eos else stop_token_ids | self._eos_token_ids,
                min_tokens=submit.min_tokens,
            ),
            arrival_s=submit.arrival_s,
            kind=submit.kind,
            priority=submit.priority,
            tenant=submit.tenant,
            cache_salt=submit.cache_salt,
            deadline_s=submit.deadline_s,
            prompt_logprobs=submit.sampling.prompt_logprobs is not None,
            extra_bytes=extra_bytes(len(prompt), submit) + (0 if submit.grammar is None else MATCHER_BYTES),
        )

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        waits = self._grammars.drop(request_id)
        if waits is not None:  # the scheduler has not heard of it
            self._outputs.open(request_id, waits.output)
            self._outputs.apply((Finished(waits.request.id, reason, num_output_tokens=0, num_cached_tokens=0),))
            return
        self._apply(self._scheduler.finish(RequestId(request_id), reason))

    def _step(self) -> StepTiming:
        started_s = self._clock()
        plan = self._scheduler.step(started_s)
        scheduled_s = self._clock()
        self._apply(plan.events)
        self._note_progress(plan)
        ran_s = before_run_s = self._clock()
        result = StepResult(())
        if plan.slices:
            result = self._run(plan)
            ran_s = self._clock()
            if len(result.results) == len(plan.slices):  # otherwise ``commit`` says what is wrong with it
                result = self._grammars.advance(plan, self._outputs.decide(plan, result))
        before_commit_s = self._clock()
        self._apply(self._scheduler.commit(result, before_commit_s))
        self._outputs.note_progress(plan)
        ended_s = self._clock()
        return StepTiming(
            step_id=plan.step_id,
            num_tokens=plan.num_tokens,
            num_slices=len(plan.slices),
            schedule_s=(scheduled_s - started_s) + (ended_s - before_commit_s),
            run_s=ran_s - before_run_s,
            total_s=ended_s - started_s,
        )

    def _run(self, plan: StepPlan) -> StepResult:
        sampling = self._sampling
        params = tuple([sampling[scheduled.request_id] for scheduled in plan.slices])
        batch = RunBatch(plan, params, self._grammars.masks(plan))
        try:
            result = self._runner.run(batch)
        except Exception as error:  # noqa: BLE001 - whatever a runner raises ends the step, not the engine
            self._num_failed_in_a_row += 1
            self._counters.num_failed_steps += 1
            _log.exception("step %d with %d requests failed", plan.step_id, len(plan.slices))
            if self._memory is not None:  # nearly every way to run out of memory ends here
                self._memory.relieve(self._clock())
            return StepResult.failed(plan, f"the step failed: {type(error).__name__}")
        self._num_failed_in_a_row = 0
        return result

    def _note_progress(self, plan: StepPlan) -> None:
        did_something = plan.slices or any(isinstance(event, Finished) for event in plan.events)
        self._num_idle_in_a_row = 0 if did_something else self._num_idle_in_a_row + 1
        assert self._num_idle_in_a_row < MAX_IDLE_STEPS, "requests live, and the scheduler plans nothing"

    def _apply(self, events: tuple[Event, ...]) -> None:
        self._outputs.apply(events)
        self._counters.count(events)
        for event in events:
            if isinstance(event, Finished):
                del self._sampling[event.request_id]
                self._grammars.forget(event.request_id)

    def _stats(self) -> EngineStats:
        now = self._scheduler.stats()
        counters = self._counters
        return EngineStats(
            num_running=now.num_running,
            num_waiting=now.num_waiting + now.num_preempted + len(self._grammars.compiling_ids),
            num_blocks=now.num_blocks,
            num_used_blocks=now.num_used_blocks,
            num_preemptions=counters.num_preemptions,
            num_prefix_queried_tokens=counters.num_prefix_queried_tokens,
            num_prefix_hit_tokens=counters.num_prefix_hit_tokens,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_steps=now.num_steps,
            num_failed_steps=counters.num_failed_steps,
            reserved_bytes=now.num_reserved_bytes,
            memory=EngineMemory() if self._memory is None else self._memory.state,
        )


class _Prepared(NamedTuple):
    """A request on its way to the scheduler."""

    request: Request
    output: RequestOutput
    sampling: SamplingParams


class _Counters:
    """What only ever grows, counted from events."""

    __slots__ = (
        "num_failed_steps",
        "num_generation_tokens",
        "num_preemptions",
        "num_prefix_hit_tokens",
        "num_prefix_queried_tokens",
        "num_prompt_tokens",
    )

    def __init__(self) -> None:
        self.num_failed_steps = 0
        self.num_generation_tokens = 0
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        self.num_prefix_queried_tokens = 0
        self.num_prompt_tokens = 0

    def count(self, events: tuple[Event, ...]) -> None:
        for event in events:
            if isinstance(event, TokensCommitted):
                self.num_generation_tokens += 1
            elif isinstance(event, Admitted):
                self.num_prompt_tokens += event.num_prompt_tokens
            elif isinstance(event, PrefixHit) and event.first:
                self.num_prefix_queried_tokens += event.num_queried_tokens
                self.num_prefix_hit_tokens += event.num_hit_tokens
            elif isinstance(event, Preempted):
                self.num_preemptions += 1


def model_info(runner: Runner, scheduler: Scheduler) -> ModelInfo:
    """The runner's facts with the scheduler's limit where that is tighter: what admission must know."""
    info, config = runner.info, scheduler.config
    assert (info.num_blocks, info.block_size) == (config.num_blocks, config.block_size), (
        "the scheduler plans for the KV cache that the runner has"
    )
    return ModelInfo(
        name=info.name,
        fingerprint=info.fingerprint,
        vocab_size=info.vocab_size,
        max_model_len=min(info.max_model_len, config.max_model_len),
        eos_token_ids=info.eos_token_ids,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        weights_bytes=info.weights_bytes,
        kv_cache_bytes=info.kv_cache_bytes,
        hidden_size=info.hidden_size,
    )
