"""Time to first token and inter-token latency of requests that arrive together, through the engine.

Owns: ``measure_bursts``. Every prompt is fresh. Time to first token is that of the whole crowd: the last of thirty-two
prompts waits for the others. Between tokens lies a whole step, with whatever part of another prompt is in it. Beside
each burst stands what the cost model predicted, and one that would not end in time is not begun.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Protocol

from bench.full_size.points import FIRST_TOKEN_ID
from bench.full_size.serving import GoOn, Latencies, OnStep, Served, Wanted
from mixtral_serve.engine.messages import StepTiming

BURSTS: Final = tuple((num_requests, num_tokens) for num_tokens in (64, 512) for num_requests in (1, 8, 32))
"""Requests and prompt tokens, most important first."""
NUM_OUTPUT_TOKENS: Final = 24
_ROUNDS_ALONE: Final = 3


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that arrive together; ``predicted`` is what the simulation said of the same requests."""

    num_requests: int
    num_prompt_tokens: int
    measured: Latencies
    predicted: Latencies


@dataclass(slots=True)
class Bursts:
    """What was measured, what was not, and what steps cost besides the runner."""

    bursts: list[Burst] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    timings: list[StepTiming] = field(default_factory=list)

    @property
    def outside_runner_s(self) -> float:
        """Median of what a step takes besides the runner; 0 where nothing was measured."""
        return median([timing.total_s - timing.run_s for timing in self.timings] or [0.0])


class _Engine(Protocol):
    """Real or simulated."""

    def run(self, wanted: list[Wanted]) -> list[Served]: ...


class _WatchedEngine(Protocol):
    """The real one."""

    def run(self, wanted: list[Wanted], *, go_on: GoOn, on_step: OnStep) -> list[Served]: ...


def measure_bursts(
    engine: _WatchedEngine,
    predicted: _Engine,
    *,
    vocab_size: int,
    left_s: Callable[[], float],
    on_step: Callable[[], None] = lambda: None,
) -> Bursts:
    """Run ``BURSTS`` through ``engine``, as far as ``left_s()`` seconds last."""
    found = Bursts()

    def note(timing: StepTiming) -> None:
        found.timings.append(timing)
        on_step()

    for serial, (num_requests, num_tokens) in enumerate(BURSTS):
        rounds = _ROUNDS_ALONE if num_requests == 1 else 1
        crowds = [
            crowd(num_requests, num_tokens, vocab_size=vocab_size, seed=f"{serial}/{number}")
            for number in range(rounds)
        ]
        expected = [one for wanted in crowds for one in predicted.run(wanted)]
        needed_s = rounds * max(one.e2e_s for one in expected)
        name = f"{num_requests} prompts of {num_tokens} tokens at once"
        if needed_s > left_s():
            found.left_out[name] = f"they would take {needed_s:.0f} s, {max(0.0, left_s()):.0f} s were left"
            continue
        served = [one for wanted in crowds for one in engine.run(wanted, go_on=lambda _: left_s() > 0, on_step=note)]
        if not all(one.is_complete for one in served):
            found.left_out[name] = f"they should have taken {needed_s:.0f} s, and did not end in time"
            continue
        found.bursts.append(Burst(num_requests, num_tokens, Latencies.of(served), Latencies.of(expected)))
    return found


def crowd(num_requests: int, num_tokens: int, *, vocab_size: int, seed: str) -> list[Wanted]:
    """``num_requests`` fresh prompts that arrive at once."""
    generator = random.Random(seed)
    ids = range(FIRST_TOKEN_ID % vocab_size, vocab_size)
    return [Wanted(0.0, generator.choices(ids, k=num_tokens), NUM_OUTPUT_TOKENS) for _ in range(num_requests)]
