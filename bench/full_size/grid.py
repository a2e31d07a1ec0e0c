"""The measured grid: seconds of each step, straight from the runner.

Owns: ``measure_grid``. The grid is run through again and again, and what counts of a point is the median: a machine
that drifts then blurs all points alike. The first time each point is run twice, to warm up and to count touched
experts, so the most important points have a figure even where there is time for little else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench.full_size.points import Blocks, Point, batch_of
from bench.full_size.routing import ExpertCounter
from bench.full_size.work import Work, WorkSizes
from mixtral_serve.contract import RunBatch
from mixtral_serve.model.runner import MixtralRunner
from scheduler.config import SchedulerConfig

_MOST_RUNS: Final = 7
_LEAST_RUNS: Final = 3
_SECONDS_PER_POINT: Final = 1.5
"""Beyond the least number, runs go on while those of a point took less than this together."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One point."""

    point: Point
    median_s: float
    least_s: float
    num_runs: int
    touched_experts: float
    """Per layer, as counted."""
    work: Work


@dataclass(slots=True)
class Grid:
    """What was measured, and what was not, with the reason."""

    measured: list[Measured] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Step:
    """A point on its way: the step that stands for it, and how long it took so far."""

    point: Point
    batch: RunBatch
    touched_experts: float
    runs_s: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether more runs would tell little."""
        num_runs = len(self.runs_s)
        return num_runs >= _MOST_RUNS or (num_runs >= _LEAST_RUNS and math.fsum(self.runs_s) > _SECONDS_PER_POINT)

    def run(self, runner: MixtralRunner) -> None:
        """Once more."""
        began_s = time.perf_counter()
        result = runner.run(self.batch)
        self.runs_s.append(time.perf_counter() - began_s)
        assert all(part.error is None for part in result.results), "synthetic weights keep numbers finite"


def measure_grid(
    runner: MixtralRunner,
    points: Iterable[Point],
    *,
    config: SchedulerConfig,
    counter: ExpertCounter,
    sizes: WorkSizes,
    is_over: Callable[[], bool],
    on_step: Callable[[], None] = lambda: None,
) -> Grid:
    """Run ``points`` in their order until ``is_over``; ``on_step`` is called after each step, outside its time."""
    grid = Grid()
    blocks = Blocks(config.num_blocks, config.block_size)
    steps: list[_Step] = []
    for point in points:
        obstacle = point.obstacle(config)
        if obstacle is None and is_over():
            obstacle = "there was no time left"
        if obstacle is not None:
            grid.left_out[str(point)] = obstacle
            continue
        batch = batch_of(point, blocks, vocab_size=sizes.shape.vocab_size)
        with counter.listening():
            runner.run(batch)
        steps.append(_Step(point, batch, counter.touched))
        steps[-1].run(runner)
        on_step()
    while (unfinished := [step for step in steps if not step.is_done]) and not is_over():
        for step in unfinished:
            if is_over():
                break
            step.run(runner)
            on_step()
    grid.measured = [_measured(step, sizes) for step in steps]
    return grid


def _measured(step: _Step, sizes: WorkSizes) -> Measured:
    work = sizes.of(step.batch.plan, step.touched_experts)
    return Measured(step.point, median(step.runs_s), min(step.runs_s), len(step.runs_s), step.touched_experts, work)
