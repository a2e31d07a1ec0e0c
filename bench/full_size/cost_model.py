"""What a step costs, in terms that each mean something: fitted to a grid, then asked about any step.

Owns: ``CostModel`` and ``fit``. A step takes what a step and each of its layers cost whatever they compute (measured
apart, on a model so narrow that it computes nothing), the products with weights, and reading keys and values, scoring
and sampling. Products read weights and compute at once, so their time lies between the larger of the two and their
sum: ``(reading ** p + computing ** p) ** (1 / p)``, with the ``p`` that fits best. All factors are inverse rates:
seconds per byte, seconds per operation.

The fit minimises relative errors, so that a step of one row counts as much as one of five hundred, and a point that
lies far off (the machine did something else at that moment) pulls less than its distance. Factors are searched for as
logarithms and so are positive.

Rejected: a table with interpolation (nothing can be said of another machine or of more layers); fitting the cost of a
layer together with the rest (whatever bends the curve at small batches ends up in it, and then does not scale).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy
from numpy.typing import NDArray

from bench.full_size.work import Work
from bench.measure import quantile

FITTED: Final = Work._fields[1:]
"""Reading weights and computing with them, which overlap, and all else."""
BANDWIDTH_BOUND: Final = ("weight_bytes", "kv_bytes")
CORE_BOUND: Final = ("operations", "pairs", "sampled")
OVERLAPS: Final = (1.0, 1.5, 2.0, 3.0, 6.0)
"""The ``p`` that are tried: from one after the other to all at once."""

_OUTLIER: Final = 0.1
"""Relative error from which on a point's pull grows no further."""
_ITERATIONS: Final = 200
_NO_SHARE: Final = 0.002
"""A factor is 0 if the term is nowhere a larger share of a step."""

_Array: TypeAlias = NDArray[numpy.float64]


@dataclass(frozen=True, slots=True)
class FixedCosts:
    """What does not depend on how wide a model is, seconds."""

    step_s: float
    layer_s: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Everything that prices a step in the runner."""

    fixed: FixedCosts
    seconds_per: Mapping[str, float]
    """Of each of ``FITTED``, per unit."""
    overlap: float
    """``p``: 1 where reading and computing take turns, larger where they go on at once."""

    def seconds(self, work: Work) -> float:
        """Of one step in the runner."""
        amounts = zip(FITTED, work[1:], strict=True)
        reading, computing, *others = (self.seconds_per[name] * amount for name, amount in amounts)
        products: float = (reading**self.overlap + computing**self.overlap) ** (1 / self.overlap)
        return self.fixed.step_s + self.fixed.layer_s * work.layers + products + sum(others)

    def scaled(self, *, bandwidth: float, cores: float) -> CostModel:
        """On a machine with so many times the memory bandwidth and so many times the cores."""
        factors = dict.fromkeys(BANDWIDTH_BOUND, bandwidth) | dict.fromkeys(CORE_BOUND, cores)
        scaled = {name: value / factors[name] for name, value in self.seconds_per.items()}
        return CostModel(self.fixed, scaled, self.overlap)


@dataclass(frozen=True, slots=True)
class FitError:
    """How far the model is from what it was fitted to: relative, without sign."""

    median: float
    p90: float
    worst: float
    worst_index: int


def fit(works: Sequence[Work], seconds: Sequence[float], fixed: FixedCosts) -> CostModel:
    """The model with the least relative errors; there must be more steps than terms."""
    amounts = numpy.array([work[1:] for work in works])
    took_s = numpy.array(seconds)
    fixed_s = numpy.array([fixed.step_s + fixed.layer_s * work.layers for work in works])
    best: tuple[float, _Array, float] | None = None
    for overlap in OVERLAPS:
        factors, loss = _search(amounts, took_s, fixed_s, overlap)
        if best is None or loss < best[0]:
            best = loss, factors, overlap
    assert best is not None
    _, factors, overlap = best
    shares = (amounts * factors / took_s[:, None]).max(axis=0)
    kept = numpy.where(shares > _NO_SHARE, factors, 0.0)
    return CostModel(fixed, dict(zip(FITTED, kept.tolist(), strict=True)), overlap)


def fit_error(model: CostModel, works: Sequence[Work], seconds: Sequence[float]) -> FitError:
    """Of each step that ``model`` was fitted to, or of others."""
    errors = [abs(model.seconds(work) / took_s - 1) for work, took_s in zip(works, seconds, strict=True)]
    ascending = sorted(errors)
    worst = max(range(len(errors)), key=errors.__getitem__)
    return FitError(quantile(ascending, 0.5), quantile(ascending, 0.9), errors[worst], worst)


def _search(amounts: _Array, took_s: _Array, fixed_s: _Array, overlap: float) -> tuple[_Array, float]:
    """Factors of least loss and the loss, by damped Gauss-Newton steps on their logarithms."""
    # A fifth of what each term could be at most: within reach of the truth from either side.
    logs = numpy.log(0.2 * (took_s[:, None] / numpy.maximum(amounts, 1e-30)).min(axis=0))

    def errors(logs: _Array) -> _Array:
        terms = amounts * numpy.exp(logs)
        products = (terms[:, 0] ** overlap + terms[:, 1] ** overlap) ** (1 / overlap)
        found: _Array = (fixed_s + products + terms[:, 2:].sum(axis=1)) / took_s - 1
        return found

    now = errors(logs)
    damping = 1.0
    for _ in range(_ITERATIONS):
        weights = numpy.sqrt(_OUTLIER / numpy.maximum(numpy.abs(now), _OUTLIER))
        slopes = numpy.stack([(errors(logs + step) - now) / 1e-6 for step in 1e-6 * numpy.eye(len(logs))], axis=1)
        weighted = slopes * weights[:, None]
        normal = weighted.T @ weighted + damping * numpy.eye(len(logs)) * 1e-3
        step = numpy.clip(numpy.linalg.solve(normal, -weighted.T @ (now * weights)), -1.0, 1.0)
        then = errors(logs + step)
        if _loss(then) < _loss(now):
            logs, now, damping = logs + step, then, damping / 3
        else:
            damping *= 4
    return numpy.exp(logs), _loss(now)


def _loss(errors: _Array) -> float:
    """Squares of small errors, and the distance of large ones."""
    sizes = numpy.abs(errors)
    return float(numpy.where(sizes < _OUTLIER, sizes**2, 2 * _OUTLIER * sizes - _OUTLIER**2).sum())
