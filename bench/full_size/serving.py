"""Requests through an engine core, on a real clock or a virtual one.

Owns: ``serve``, which hands requests over when they are due, runs the core step by step and notes when each token
came. The same code drives the real model and the simulation, so that a prediction and its confirmation differ in what
runs the steps, and in nothing else.

Open loop: a request counts from the moment it was due, whatever the engine was busy with. As in the engine's process,
what arrives during a step is taken in after it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.measure import Quantiles
from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.messages import Cancel, StepTiming, Submit
from scheduler.lifecycle import FinishReason


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request to be."""

    due_s: float
    """Seconds after the beginning."""
    prompt: Sequence[int]
    num_output_tokens: int


@dataclass(slots=True)
class Served:
    """What came of a request; times on the clock."""

    due_s: float
    token_s: list[float] = field(default_factory=list)
    """When each token was there."""
    finish_reason: str | None = None
    num_cached_tokens: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether it got all the tokens that it asked for."""
        return self.finish_reason == FinishReason.LENGTH.value

    @property
    def ttft_s(self) -> float:
        """Time to first token, of a request that got one."""
        return self.token_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        """End to end, of a request that got a token."""
        return self.token_s[-1] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of the complete requests of a run, seconds."""

    ttft_s: Quantiles
    itl_s: Quantiles
    e2e_s: Quantiles
    num_complete: int
    num_requests: int

    @classmethod
    def of(cls, served: Sequence[Served]) -> Latencies:
        """Incomplete requests are counted, and have no latency."""
        complete = [one for one in served if one.is_complete]
        return cls(
            ttft_s=Quantiles.of(one.ttft_s for one in complete),
            itl_s=Quantiles.of(gap for one in complete for gap in one.gaps_s),
            e2e_s=Quantiles.of(one.e2e_s for one in complete),
            num_complete=len(complete),
            num_requests=len(served),
        )


@dataclass(frozen=True, slots=True)
class Timepiece:
    """What the time is, and how to let it pass until a moment."""

    now: Callable[[], float]
    wait_until: Callable[[float], None]


GoOn = Callable[[Sequence[Served]], bool]
"""Asked between two steps with the requests that have ended; False ends the run."""
OnStep = Callable[[StepTiming], None]


def serve(
    core: EngineCore,
    wanted: Sequence[Wanted],
    time: Timepiece,
    *,
    go_on: GoOn = lambda _: True,
    on_step: OnStep = lambda _: None,
) -> list[Served]:
    """Run ``wanted`` (ascending ``due_s``) to their ends; one entry each, in their order.

    When ``go_on`` says no, what still lives is cancelled; requests that were not due yet have no finish reason.
    """
    begin_s = time.now()
    results = [Served(begin_s + one.due_s) for one in wanted]
    live: dict[str, Served] = {}
    ended: list[Served] = []
    pending = deque(enumerate(wanted))
    while (pending or core.has_work) and go_on(ended):
        now_s = time.now()
        while pending and results[pending[0][0]].due_s <= now_s:
            index, one = pending.popleft()
            live[str(index)] = results[index]
            core.handle([_submit(index, one, results[index].due_s)])
        if not core.has_work:
            time.wait_until(results[pending[0][0]].due_s)
            continue
        _step(core, live, ended, time.now, on_step)
    core.handle([Cancel(request_id) for request_id in live])
    while core.has_work:
        _step(core, live, ended, time.now, on_step)
    return results


def _step(
    core: EngineCore, live: dict[str, Served], ended: list[Served], now: Callable[[], float], on_step: OnStep
) -> None:
    """One tick, and what it says of each request."""
    tick = core.tick()
    assert tick is not None, "there was work"
    at_s = now()
    for delta in tick.deltas:
        served = live[delta.request_id]
        served.token_s.extend([at_s] * len(delta.token_ids))
        if delta.finish_reason is not None:
            served.finish_reason, served.num_cached_tokens = delta.finish_reason, delta.num_cached_tokens
            ended.append(live.pop(delta.request_id))
    if tick.timing is not None:
        on_step(tick.timing)


def _submit(index: int, one: Wanted, due_s: float) -> Submit:
    return Submit(
        request_id=str(index),
        prompt=array("i", one.prompt).tobytes(),
        arrival_s=due_s,
        max_tokens=one.num_output_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=index),
    )
