"""The measurement, stage by stage, each within its share of the time.

Owns: ``measure`` and ``Findings``. The order is that of dependence: the engine is built; the grid prices its steps; a
model of their cost is fitted; bursts are measured beside what the model says of them; the model then says which rates
hold; one of them is loaded onto the engine for the time that is left. What had to be cut is found, not hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench.full_size.allowance import Allowance, NoTimeError
from bench.full_size.bursts import Bursts, measure_bursts
from bench.full_size.capacity import Capacity, Load, capacity
from bench.full_size.confirmation import Confirmation, confirm
from bench.full_size.cost_model import FITTED, FitError, fit, fit_error
from bench.full_size.engine import EnginePlan, LoadedEngine, build_engine
from bench.full_size.extrapolation import Expected, Extrapolator, StepCosts, Target
from bench.full_size.fixed_costs import measure_fixed_costs
from bench.full_size.grid import Grid, measure_grid
from bench.full_size.memory import MemoryPeak, MemoryWatch
from bench.full_size.points import points
from bench.full_size.routing import ExpertCounter
from bench.full_size.simulation import SimulatedEngine
from bench.full_size.work import WorkSizes
from bench.workload import SHAPES
from mixtral_serve.model.shape import kv_dtype_for
from scheduler.errors import PlanError

SIMULATED_REQUESTS: Final = 400
"""For one rate on the measured machine; p95 is then the 20th from the end."""
EXTRAPOLATED_REQUESTS: Final = 200
"""The same on another machine, where other uncertainties are larger."""
_LIGHT_LOAD: Final = 1.0
"""Requests in one request's own time, so that about one runs: the load where no rate that keeps the limit can be."""
_LEAST_REQUESTS: Final = 10
"""A rate is only confirmed if about so many requests arrive while there is time."""


@dataclass(slots=True)
class Findings:
    """Everything that was found; what is None could not be."""

    engine: LoadedEngine
    costs: StepCosts | None = None
    fit_error: FitError | None = None
    grid: Grid = field(default_factory=Grid)
    bursts: Bursts = field(default_factory=Bursts)
    capacities: dict[str, Capacity] = field(default_factory=dict)
    """Of the layers that are run, on this machine."""
    expected: list[Expected] = field(default_factory=list)
    """Of the whole model."""
    confirmation: Confirmation | None = None
    memory: MemoryPeak | None = None
    cut: list[str] = field(default_factory=list)
    """What was not measured, with the reason."""


def measure(
    plan: EnginePlan, allowance: Allowance, *, targets: Sequence[Target], seed: int, say: Callable[[str], None]
) -> Findings:
    """Run all stages; ``say`` is told what goes on.

    Raises:
        KernelsUnavailableError, NativeUnavailableError: nothing here computes with such weights, keys and values.
        NoTimeError: not even the weights could be made in time.
    """
    watch = MemoryWatch()
    say(f"making {plan.shape.num_layers} layers of {plan.kind} weights")
    engine = build_engine(plan, go_on=lambda: not allowance.is_over("build"))
    watch.loaded()
    allowance.end("build")
    found = Findings(engine)
    say(f"weights made in {engine.filled_s:.1f} s; measuring the grid")
    _price_steps(found, allowance, watch)
    allowance.end("grid")
    if found.costs is None:
        found.cut.append("all that needs a cost model: the grid has too few points for one")
    else:
        say("measuring bursts")
        _measure_bursts(found, found.costs, allowance, watch)
        allowance.end("bursts")
        say("looking for the rates")
        loads = {kind: Load(shape, vocab_size=plan.shape.vocab_size, seed=seed) for kind, shape in SHAPES.items()}
        _find_rates(found, found.costs, loads, allowance, targets=targets)
        allowance.end("rates")
        _confirm(found, loads, allowance, watch, say)
        allowance.end("load")
    found.memory = watch.peak()
    return found


def simulated(found: Findings) -> SimulatedEngine:
    """The engine that was measured, as its cost model has it."""
    assert found.costs is not None
    engine = found.engine
    return SimulatedEngine(engine.plan.config, engine.runner.info, found.costs.step_s, engine.table)


def _price_steps(found: Findings, allowance: Allowance, watch: MemoryWatch) -> None:
    engine = found.engine
    plan = engine.plan
    kv_dtype = kv_dtype_for(plan.kind, plan.settings.kv_cache_dtype)
    sizes = WorkSizes(plan.shape, plan.kind, kv_dtype)
    counter = ExpertCounter(engine.model, plan.shape)
    found.grid = measure_grid(
        engine.runner,
        points(),
        config=plan.config,
        counter=counter,
        sizes=sizes,
        is_over=lambda: allowance.is_over("grid"),
        on_step=watch.look,
    )
    for reason in dict.fromkeys(found.grid.left_out.values()):
        names = [name for name, its_reason in found.grid.left_out.items() if its_reason == reason]
        found.cut.append(f"steps, {reason}: {'; '.join(names)}")
    if len(found.grid.measured) < 2 * len(FITTED):
        return
    works = [one.work for one in found.grid.measured]
    seconds = [one.median_s for one in found.grid.measured]
    model = fit(works, seconds, measure_fixed_costs(plan.settings, plan.full_shape, engine.backend))
    found.fit_error = fit_error(model, works, seconds)
    found.costs = StepCosts(model, sizes, counter.popularity(), outside_runner_s=0.0)


def _measure_bursts(found: Findings, costs: StepCosts, allowance: Allowance, watch: MemoryWatch) -> None:
    found.bursts = measure_bursts(
        found.engine,
        simulated(found),
        vocab_size=found.engine.plan.shape.vocab_size,
        left_s=lambda: allowance.left_s("bursts"),
        on_step=watch.look,
    )
    found.cut += [f"{name}: {reason}" for name, reason in found.bursts.left_out.items()]
    found.costs = StepCosts(costs.model, costs.sizes, costs.popularity, found.bursts.outside_runner_s)


def _find_rates(
    found: Findings,
    costs: StepCosts,
    loads: Mapping[str, Load],
    allowance: Allowance,
    *,
    targets: Sequence[Target],
) -> None:
    """Of what was measured first; then of the whole model, here and on ``targets``."""

    def is_over() -> bool:
        return allowance.is_over("rates")

    for kind, load in loads.items():
        try:
            engine = simulated(found)
            found.capacities[kind] = capacity(engine, load, num_requests=SIMULATED_REQUESTS, is_over=is_over)
        except NoTimeError:
            found.cut.append(f"the rate of {kind} requests: there was no time left")
    plan = found.engine.plan
    try:
        config = plan.of_full_model()
    except PlanError as error:
        found.cut.append(f"the whole model: {str(error).partition(chr(10))[0]}")
        return
    kv_dtype = kv_dtype_for(plan.kind, plan.settings.kv_cache_dtype)
    sizes = WorkSizes(plan.full_shape, plan.kind, kv_dtype)
    extrapolator = Extrapolator(
        costs=StepCosts(costs.model, sizes, costs.popularity, found.bursts.outside_runner_s),
        config=config,
        info=found.engine.runner.info,
        table=found.engine.table,
        num_threads=found.engine.num_threads,
        bandwidth_bytes_per_s=found.engine.read_bytes_per_s,
    )
    for target in [extrapolator.here, *targets]:
        one = extrapolator.at(target, loads, num_requests=EXTRAPOLATED_REQUESTS, is_over=is_over)
        found.expected.append(one)
        missing = " and ".join(kind for kind in loads if kind not in one.capacities)
        if missing:
            found.cut.append(f"the rate of {missing} requests on {target}: there was no time left")


def _confirm(
    found: Findings,
    loads: Mapping[str, Load],
    allowance: Allowance,
    watch: MemoryWatch,
    say: Callable[[str], None],
) -> None:
    kind, rate_per_s = _rate_to_confirm(found, loads, allowance.left_s("load"))
    say(f"confirming {rate_per_s:g} {kind} requests per second")
    outcome = confirm(
        found.engine,
        simulated(found),
        loads[kind],
        kind=kind,
        rate_per_s=rate_per_s,
        left_s=lambda: allowance.left_s("load"),
        on_step=watch.look,
    )
    if isinstance(outcome, str):
        found.cut.append(f"a load of {rate_per_s:g} {kind} requests per second: {outcome}")
    else:
        found.confirmation = outcome


def _rate_to_confirm(found: Findings, loads: Mapping[str, Load], left_s: float) -> tuple[str, float]:
    """The first rate that keeps the limit and brings enough requests; where there is none, a light load."""
    for kind, one in found.capacities.items():
        if one.rate_per_s * (left_s - 2 * one.alone_s) >= _LEAST_REQUESTS:
            return kind, one.rate_per_s
    kind, load = next(iter(loads.items()))
    (alone,) = simulated(found).run(load.crowd(1), primed=load.primed)
    return kind, _LIGHT_LOAD / alone.e2e_s
