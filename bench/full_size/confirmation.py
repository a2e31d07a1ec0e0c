"""A predicted rate under real load: the same arrivals once through the simulation and once through the engine.

Owns: ``confirm``. Open loop on the real clock, for as long as there is time or until enough requests came; arrivals
end early enough for the last requests to be answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.full_size.capacity import Load
from bench.full_size.engine import LoadedEngine
from bench.full_size.serving import Latencies
from bench.full_size.simulation import SimulatedEngine

_DRAINS: Final = 3.0
"""Arrivals end so many predicted end-to-end times before the time is over."""
_LEAST_REQUESTS: Final = 5
_MOST_REQUESTS: Final = 400
"""About; p95 is then the 20th from the end. More would be simulated beyond the end of the time."""


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One rate, predicted and measured."""

    kind: str
    """Name of the shape of requests."""
    rate_per_s: float
    duration_s: float
    """Of arrivals."""
    predicted: Latencies
    measured: Latencies
    num_cut: int
    """Requests that were not answered when the time was over."""


def confirm(
    engine: LoadedEngine,
    simulated: SimulatedEngine,
    load: Load,
    *,
    kind: str,
    rate_per_s: float,
    left_s: Callable[[], float],
    on_step: Callable[[], None] = lambda: None,
) -> Confirmation | str:
    """Load at ``rate_per_s`` until the time is over; a sentence where there is not enough of it."""
    (alone,) = simulated.run(load.crowd(1), primed=load.primed)
    (primer,) = simulated.run([load.primed])
    duration_s = min(left_s() - primer.e2e_s - _DRAINS * alone.e2e_s, _MOST_REQUESTS / rate_per_s)
    wanted = load.wanted(rate_per_s, duration_s=duration_s) if duration_s > 0 else []
    if len(wanted) < _LEAST_REQUESTS:
        return f"{max(0.0, left_s()):.0f} s were left, too few for {_LEAST_REQUESTS} {kind} requests"
    served = engine.run(wanted, primed=load.primed, go_on=lambda _: left_s() > 0, on_step=lambda _: on_step())
    expected = simulated.run(wanted, primed=load.primed)  # afterwards: it must not take of the load's time
    num_cut = sum(not one.is_complete for one in served)
    return Confirmation(kind, rate_per_s, duration_s, Latencies.of(expected), Latencies.of(served), num_cut)
