"""Shapes, prompts and arrivals are functions of a seed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workload import SHAPES, PromptMaker, Shape, poisson_arrivals


def test_the_standard_request_is_480_shared_tokens_of_512_and_32_new_ones() -> None:
    assert SHAPES["standard"] == Shape(prompt_tokens=512, shared_prefix_tokens=480, output_tokens=32)
    assert SHAPES["fresh"] == Shape(prompt_tokens=64, shared_prefix_tokens=0, output_tokens=32)


@pytest.mark.parametrize("sizes", [(0, 0, 1), (1, 0, 0), (8, 8, 1), (8, 9, 1), (8, -1, 1)])
def test_a_shape_that_makes_no_sense_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="token"):
        Shape(*sizes)


def test_prompts_share_exactly_the_prefix() -> None:
    shape = Shape(prompt_tokens=40, shared_prefix_tokens=24, output_tokens=1)
    maker = PromptMaker(shape, token_ids=range(300, 900), seed=7)
    prompts = [maker.prompt(i) for i in range(-3, 50)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({tuple(prompt[:24]) for prompt in prompts}) == 1
    assert len({tuple(prompt[24:]) for prompt in prompts}) == len(prompts)
    assert all(token in range(300, 900) for prompt in prompts for token in prompt)


def test_prompts_repeat_with_the_seed_and_differ_without() -> None:
    shape = SHAPES["fresh"]
    prompts = [PromptMaker(shape, token_ids=range(300, 900), seed=seed).prompt(3) for seed in (1, 1, 2)]
    assert prompts[0] == prompts[1] != prompts[2]


@given(st.integers(0, 2**32), st.floats(0.5, 100), st.floats(0.1, 60))
def test_arrivals_are_seeded_ascending_and_within_the_duration(seed: int, rate: float, duration_s: float) -> None:
    arrivals = poisson_arrivals(rate, duration_s, seed)
    assert arrivals == poisson_arrivals(rate, duration_s, seed)
    assert arrivals == sorted(arrivals)
    assert all(0 <= at_s < duration_s for at_s in arrivals)


def test_arrivals_are_poisson() -> None:
    arrivals = poisson_arrivals(10, 2000, seed=1)
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    gaps = [b - a for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.03)
    assert variance == pytest.approx(mean**2, rel=0.08), "an exponential's variance is its mean squared"
