"""How many requests per second an engine can take so that nearly all are answered in time.

Owns: ``highest_rate``, a bisection over simulated loads. A rate holds if the 95th percentile of end-to-end times stays
within the limit; the answer has two digits, and the figures are those of the rate as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.full_size.allowance import NoTimeError
from bench.full_size.points import FIRST_TOKEN_ID
from bench.full_size.serving import Served, Wanted
from bench.full_size.simulation import SimulatedEngine
from bench.measure import quantile
from bench.workload import PromptMaker, Shape, poisson_arrivals

LIMIT_S: Final = 1.5
"""For the 95th percentile, end to end."""
_SHARE: Final = 0.95
_LEAST: Final = -270
"""Number of the least rate that is tried: 0.001/s, one request in a quarter of an hour."""
_MOST: Final = 270
_TWICE: Final = 27
"""So many rates further is about twice the rate."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate of one kind of requests."""

    rate_per_s: float
    """0 where even one request alone takes longer."""
    p50_s: float | None
    p95_s: float | None
    alone_s: float
    """End to end, one request with nobody else."""
    saturated_per_s: float
    """Requests per second where all are there at once and nobody asks how long they wait."""
    reason: str | None = None
    """Why the rate is 0."""


@dataclass(frozen=True, slots=True)
class Tail:
    """End-to-end times of one load."""

    p50_s: float
    p95_s: float


class Load:
    """Poisson arrivals of one shape of requests, the same at every run with the same rate.

    Args:
        shape: of each request.
        vocab_size: of the model; prompts are made of ordinary tokens.
        seed: of arrivals and prompts.
    """

    def __init__(self, shape: Shape, *, vocab_size: int, seed: int) -> None:
        self.shape = shape
        self.seed = seed
        self._prompts = PromptMaker(shape, token_ids=range(FIRST_TOKEN_ID % vocab_size, vocab_size), seed=seed)

    @property
    def primed(self) -> Wanted:
        """A request that leaves the shared prefix in the cache."""
        return Wanted(0.0, self._prompts.prompt(-1), self.shape.output_tokens)

    def wanted(self, rate_per_s: float, *, duration_s: float) -> list[Wanted]:
        """What arrives within ``duration_s``."""
        arrivals_s = poisson_arrivals(rate_per_s, duration_s, self.seed)
        return [
            Wanted(at_s, self._prompts.prompt(index), self.shape.output_tokens) for index, at_s in enumerate(arrivals_s)
        ]

    def crowd(self, num_requests: int) -> list[Wanted]:
        """So many requests at once."""
        return [Wanted(0.0, self._prompts.prompt(index), self.shape.output_tokens) for index in range(num_requests)]


def capacity(
    engine: SimulatedEngine,
    load: Load,
    *,
    num_requests: int,
    limit_s: float = LIMIT_S,
    is_over: Callable[[], bool] = lambda: False,
) -> Capacity:
    """The highest rate at which ``engine`` answers 95 % of about ``num_requests`` within ``limit_s``.

    Raises:
        NoTimeError: ``is_over`` said so before the rate was found.
    """
    (single,) = engine.run(load.crowd(1), primed=load.primed)
    assert single.is_complete, "the schedule has room for one request"
    everybody = engine.run(load.crowd(num_requests), primed=load.primed, go_on=lambda _: not is_over())
    if is_over():
        raise NoTimeError
    saturated_per_s = num_requests / max(one.e2e_s for one in everybody)
    if single.e2e_s > limit_s:
        reason = f"one request alone takes {single.e2e_s:.2f} s"
        return Capacity(0.0, None, None, single.e2e_s, saturated_per_s, reason)

    def tail(rate_per_s: float) -> Tail | None:
        wanted = load.wanted(rate_per_s, duration_s=num_requests / rate_per_s)
        most_late = (1 - _SHARE) * len(wanted)
        late = _Late(limit_s, most_late)
        served = engine.run(wanted, primed=load.primed, go_on=lambda ended: late.are_few(ended) and not is_over())
        if is_over():
            raise NoTimeError
        return None if late.are_many else tail_of(served)

    found = highest_rate(tail, first=saturated_per_s / 4, limit_s=limit_s)
    if found is None:
        reason = f"two requests that meet take longer than {limit_s:g} s, at any rate"
        return Capacity(0.0, None, None, single.e2e_s, saturated_per_s, reason)
    rate_per_s, best = found
    return Capacity(rate_per_s, best.p50_s, best.p95_s, single.e2e_s, saturated_per_s)


def tail_of(served: Sequence[Served]) -> Tail | None:
    """None where a request got nothing, or not all, or nobody came."""
    if not served or not all(one.is_complete for one in served):
        return None
    ascending = sorted(one.e2e_s for one in served)
    return Tail(quantile(ascending, 0.5), quantile(ascending, _SHARE))


class _Late:
    """Counts those that missed the limit, so that a hopeless load need not be served to its end."""

    def __init__(self, limit_s: float, most: float) -> None:
        self._limit_s = limit_s
        self._most = most
        self._num_seen = self._num_late = 0

    def are_few(self, ended: Sequence[Served]) -> bool:
        """Whether the limit may still hold."""
        for one in ended[self._num_seen :]:
            self._num_late += not one.is_complete or one.e2e_s > self._limit_s
        self._num_seen = len(ended)
        return not self.are_many

    @property
    def are_many(self) -> bool:
        """More than may be."""
        return self._num_late > self._most + 1


def highest_rate(tail: Callable[[float], Tail | None], *, first: float, limit_s: float) -> tuple[float, Tail] | None:
    """The highest rate, in two digits, whose p95 is within ``limit_s``; None if that of no rate worth a name is.

    ``tail`` says None of a hopeless rate; ``first`` is a rate to begin with.
    """

    def holds(index: int) -> Tail | None:
        found = tail(nth_rate(index))
        return found if found is not None and found.p95_s <= limit_s else None

    low = high = min(max(index_of(first), _LEAST), _MOST)
    while (best := holds(low)) is None:
        if low == _LEAST:
            return None
        low, high = max(low - _TWICE, _LEAST), low
    while low == high and high < _MOST:
        high = min(high + _TWICE, _MOST)
        found = holds(high)
        low, best = (low, best) if found is None else (high, found)
    while high - low > 1:
        middle = (low + high) // 2
        found = holds(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return nth_rate(low), best


def nth_rate(index: int) -> float:
    """The rates that two digits can name, ascending: 1.0 is number 0, 1.1 number 1, 10 number 90."""
    decade, digits = divmod(index, 90)
    return float(f"{digits + 10}e{decade - 1}")


def index_of(rate_per_s: float) -> int:
    """Number of the highest rate of ``nth_rate`` that is not above ``rate_per_s``."""
    decade = math.floor(math.log10(rate_per_s))
    index = 90 * decade + math.floor(rate_per_s / 10.0**decade * 10) - 10
    return index + (nth_rate(index + 1) <= rate_per_s)
