"""The engine on a virtual clock: the real scheduler and engine core, around a runner that only knows what steps cost.

Owns: ``SimulatedEngine``. Its runner answers every slice with a token and moves the clock by what the cost model says;
everything else is the engine's own code, so a simulated second holds the schedule that a real one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.full_size.serving import GoOn, Served, Timepiece, Wanted, serve
from mixtral_serve.contract import ModelInfo, RunBatch
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.config import SchedulerConfig
from scheduler.plan import SliceResult, StepPlan, StepResult
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler
from scheduler.sim import VirtualClock

_TOKEN_ID = 7
"""What every simulated step samples."""


class PricedRunner:
    """Implements ``mixtral_serve.contract.Runner`` without a model."""

    def __init__(self, info: ModelInfo, clock: VirtualClock, seconds: Callable[[StepPlan], float]) -> None:
        self._info = info
        self._clock = clock
        self._seconds = seconds

    @property
    def info(self) -> ModelInfo:
        """Of the model that it stands for."""
        return self._info

    def run(self, batch: RunBatch) -> StepResult:
        """Let the time pass that the step would take."""
        self._clock.advance(self._seconds(batch.plan))
        results = [
            SliceResult(part.request_id, token_id=_TOKEN_ID if part.samples else None) for part in batch.plan.slices
        ]
        return StepResult(tuple(results))


@dataclass(frozen=True, slots=True)
class SimulatedEngine:
    """An engine of which only the cost of its steps is known."""

    config: SchedulerConfig
    info: ModelInfo
    step_s: Callable[[StepPlan], float]
    """Seconds of a whole step: the runner and everything around it."""
    table: TokenBytes

    def run(
        self, wanted: Sequence[Wanted], *, primed: Wanted | None = None, go_on: GoOn = lambda _: True
    ) -> list[Served]:
        """Serve ``wanted`` by an engine that has served ``primed`` before, and nothing else."""
        clock = VirtualClock()
        core = EngineCore(
            Scheduler(self.config, POLICIES["fcfs"]()),
            PricedRunner(self.info, clock, self.step_s),
            self.table,
            clock=clock,
        )
        time = Timepiece(clock, clock.advance_to)
        if primed is not None:
            serve(core, [primed], time)
        return serve(core, wanted, time, go_on=go_on)
