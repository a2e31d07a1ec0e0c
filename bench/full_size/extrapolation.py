"""From the measured machine and layers to others: more layers, more cores, more bandwidth.

Owns: ``extrapolate`` and ``RULE``. The cost model's factors are inverse rates, so another machine is a division, and
more layers are more work; which experts are touched is taken to be alike in all layers. The rule is deliberately
plain: it knows no cache that is larger, no instruction that is wider and no clock that is higher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from bench.full_size.allowance import NoTimeError
from bench.full_size.capacity import Capacity, Load, capacity
from bench.full_size.cost_model import CostModel
from bench.full_size.points import Blocks, Point, batch_of
from bench.full_size.routing import Popularity
from bench.full_size.simulation import SimulatedEngine
from bench.full_size.work import WorkSizes
from mixtral_serve.contract import ModelInfo
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.config import SchedulerConfig
from scheduler.plan import StepPlan

RULE: Final = (
    "reading weights, keys and values scales with the bandwidth of memory; products, scores and sampling scale with"
    " the number of cores (of the measured kind); what a step and a layer cost in any case stays as it was measured"
)
_BLOCK_SIZE: Final = 16
"""Of no consequence for a cost, but a plan has blocks."""
DECODES: Final = (1, 8, 32, 64)
PREFILL: Final = 512


@dataclass(frozen=True, slots=True)
class Target:
    """A machine to extrapolate to."""

    cores: int
    bandwidth_bytes_per_s: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """``8:80``: cores, and gigabytes per second that a plain read gets.

        Raises:
            ValueError: it is something else.
        """
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*(?:\.\d+)?)", text)
        if found is None:
            raise ValueError(f"{text} is not CORES:GIGABYTES_PER_SECOND, as in 8:80")
        return cls(int(found[1]), float(found[2]) * 1e9)

    def __str__(self) -> str:
        return f"{self.cores} cores, {self.bandwidth_bytes_per_s / 1e9:.0f} GB/s"


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Everything that prices a step of one model on one machine."""

    model: CostModel
    sizes: WorkSizes
    popularity: Popularity
    outside_runner_s: float

    def runner_s(self, plan: StepPlan) -> float:
        """Seconds in the runner."""
        return self.model.seconds(self.sizes.of(plan, self.popularity.touched))

    def step_s(self, plan: StepPlan) -> float:
        """Seconds of the whole step."""
        return self.runner_s(plan) + self.outside_runner_s

    def point_s(self, point: Point) -> float:
        """Seconds in the runner of a point of the grid."""
        blocks = Blocks(point.num_blocks(_BLOCK_SIZE) + 1, _BLOCK_SIZE)
        return self.runner_s(batch_of(point, blocks, vocab_size=self.sizes.shape.vocab_size).plan)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the whole model would do on one machine."""

    target: Target
    decode_s: dict[int, float]
    """By batch: a step at contexts of 512 tokens."""
    prefill_tokens_per_s: float
    capacities: dict[str, Capacity]
    """By kind of request; those that there was time for."""


@dataclass(frozen=True, slots=True)
class Extrapolator:
    """From measured costs to the whole model.

    ``num_threads`` and ``bandwidth_bytes_per_s`` are the measured machine's; ``costs`` are of the whole model there.
    """

    costs: StepCosts
    config: SchedulerConfig
    info: ModelInfo
    table: TokenBytes
    num_threads: int
    bandwidth_bytes_per_s: float

    def at(
        self,
        target: Target,
        loads: Mapping[str, Load],
        *,
        num_requests: int,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Expected:
        """The whole model on ``target``; rates that were not found before ``is_over`` are left out."""
        cores = target.cores / self.num_threads
        bandwidth = target.bandwidth_bytes_per_s / self.bandwidth_bytes_per_s
        model = self.costs.model.scaled(bandwidth=bandwidth, cores=cores)
        costs = StepCosts(model, self.costs.sizes, self.costs.popularity, self.costs.outside_runner_s)
        engine = SimulatedEngine(self.config, self.info, costs.step_s, self.table)
        capacities = {}
        for kind, load in loads.items():
            with suppress(NoTimeError):
                capacities[kind] = capacity(engine, load, num_requests=num_requests, is_over=is_over)
        return Expected(
            target=target,
            decode_s={batch: costs.point_s(Point(batch, 512)) for batch in DECODES},
            prefill_tokens_per_s=PREFILL / costs.point_s(Point(chunk=PREFILL)),
            capacities=capacities,
        )

    @property
    def here(self) -> Target:
        """The measured machine."""
        return Target(self.num_threads, self.bandwidth_bytes_per_s)
