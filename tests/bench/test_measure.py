"""Quantiles against a naive definition; the facts of the machine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import Machine, Quantiles, quantile

samples = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(samples, st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_lies_between_the_order_statistics_around_it(sample: list[float], share: float) -> None:
    ascending = sorted(sample)
    exact = share * (len(sample) - 1)
    value = quantile(ascending, share)
    assert ascending[math.floor(exact)] <= value + 1e-6
    assert value <= ascending[math.ceil(exact - 1e-9)] + 1e-6


@given(samples)
def test_quantiles_do_not_depend_on_the_order_and_ascend(sample: list[float]) -> None:
    found = Quantiles.of(sample)
    assert found == Quantiles.of(reversed(sample))
    assert found.p50 is not None
    assert found.p95 is not None
    assert found.p99 is not None
    assert min(sample) <= found.p50 <= found.p95 + 1e-9 <= found.p99 + 2e-9 <= max(sample) + 3e-9


def test_quantiles_of_a_known_sample() -> None:
    found = Quantiles.of(range(101))
    assert (found.p50, found.p95, found.p99) == pytest.approx((50, 95, 99))


def test_an_empty_sample_has_no_quantiles() -> None:
    assert Quantiles.of([]) == Quantiles(None, None, None)


def test_the_machine_says_what_it_is() -> None:
    machine = Machine.this()
    assert machine.num_cpus >= 1
    assert machine.cpu
    assert machine.python.startswith("3.")
