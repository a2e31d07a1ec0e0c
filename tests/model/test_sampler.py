"""The sampler's laws: what the filters keep, where the randomness comes from, and that rows do not touch each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.contract import SamplingParams
from mixtral_serve.model.logit_processors import SampleRow
from mixtral_serve.model.sampler import NON_FINITE, prepare, sample, uniform
from tests.model.rejection import draw_by_rejection

GREEDY = SamplingParams(temperature=0)


def draw_many(logits: Sequence[float], params: SamplingParams, num: int) -> Counter[int]:
    """Tokens of ``num`` positions of one random stream, over the same logits."""
    rows = [SampleRow(params, position) for position in range(num)]
    results = sample(torch.tensor([logits]).expand(num, -1), prepare(rows))
    return Counter(result.token_id for result in results)


def naive_kept(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Token -> probability after the filters, by their definitions."""
    peak = max(logits)
    weights = {i: math.exp((logit - peak) / params.temperature) for i, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        total = math.fsum(weights[i] for i in ranked)
        reached = 0.0
        for n, i in enumerate(ranked, start=1):
            reached += weights[i]
            if reached >= params.top_p * total:
                ranked = ranked[:n]
                break
    ranked = [i for i in ranked if weights[i] >= params.min_p]
    total = math.fsum(weights[i] for i in ranked)
    return {i: weights[i] / total for i in ranked if weights[i] > 0}


def naive_sample(logits: Sequence[float], params: SamplingParams, position: int) -> int:
    target = uniform(params.seed, params.choice, position)
    if not 0 < params.top_k < len(logits) and params.top_p == 1 and not params.min_p:
        return draw_by_rejection(logits, params.temperature, target).token
    kept = naive_kept(logits, params)
    reached = 0.0
    for i in sorted(kept):
        reached += kept[i]
        if reached > target:
            return i
    return max(kept)


# Few distinct values, so that ties are common; multiples of 1/4, so that both sides round alike.
logits_rows = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=40)
sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.503, 0.101, 1e-9]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 1000]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 3),
)


@given(logits_rows, sampling_params, st.integers(0, 1000))
def test_a_draw_is_the_one_that_the_definitions_give(logits, params, position) -> None:
    result = sample(torch.tensor([logits]), prepare([SampleRow(params, position)]))[0]
    assert result.token_id == naive_sample(logits, params, position)


@given(st.lists(st.tuples(sampling_params, st.integers(0, 50)), min_size=1, max_size=6), st.data())
def test_rows_of_one_batch_do_not_touch_each_other(rows, data) -> None:
    width = data.draw(st.integers(1, 30))
    one_row = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=width, max_size=width)
    logits = torch.tensor([data.draw(one_row) for _ in rows])
    asked = [SampleRow(replace(params, logprobs=2), position) for params, position in rows]
    together = sample(logits, prepare(asked))
    alone = [sample(logits[i : i + 1], prepare([row]))[0] for i, row in enumerate(asked)]
    assert together == alone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [3000, 65])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=0.95),
        SamplingParams(top_p=0.5, top_k=2000),
        SamplingParams(top_k=1500),
        SamplingParams(min_p=0.5),
        SamplingParams(top_p=0.9999999, min_p=0.9),
        SamplingParams(top_p=0.02),
        SamplingParams(top_p=0.5, temperature=0.3),
    ],
)
def test_a_nucleus_wider_than_the_first_look_is_still_exact(params, vocab, tied) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, vocab, generator=generator)
    if tied:
        logits = (logits * 4).round() / 4
    rows = [SampleRow(params, position) for position in range(20)]
    found = [result.token_id for result in sample(logits.expand(20, -1), prepare(rows))]
    assert found == [naive_sample(logits[0].tolist(), params, position) for position in range(20)]


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 3.0])
def test_a_near_total_never_moves_the_cut_of_a_nucleus(temperature) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(1, 2000, generator=generator) * 6
    weights = ((logits[0].double() - logits.max()) / temperature).exp()
    ranked = weights.sort(descending=True)
    reached = ranked.values.cumsum(0) / weights.sum()
    for rank in range(1, 20):
        for nudge, num_kept in ((-1e-9, rank), (1e-9, rank + 1)):  # nearer to the edge than fp32 can tell
            top_p = float(reached[rank - 1]) + nudge
            if not 0 < top_p < 1:
                continue
            params = SamplingParams(temperature=temperature, top_p=top_p)
            counts = draw_many(logits[0].tolist(), params, 40)
            assert set(counts) <= set(ranked.indices[:num_kept].tolist())
            rows = [SampleRow(params, position) for position in range(3)]
            found = [result.token_id for result in sample(logits.expand(3, -1), prepare(rows))]
            assert found == [naive_sample(logits[0].tolist(), params, position) for position in range(3)]


SKEWED = [0.0, 1.0, 2.0, -1.0, 0.5, 0.5, 3.0, -3.0, 1.5, 0.25, -0.5, 2.5]
THREE_CHUNKS = [math.sin(i) + i / 70 for i in range(150)]


@pytest.mark.parametrize("logits", [SKEWED, THREE_CHUNKS], ids=["few", "many"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.6),
        SamplingParams(seed=3, temperature=1.7, top_p=0.8),
        SamplingParams(seed=4, top_k=5),
        SamplingParams(seed=5, min_p=0.1),
        SamplingParams(seed=6, temperature=1.3, top_k=9, top_p=0.9, min_p=0.02, choice=2),
    ],
)
def test_frequencies_follow_the_filtered_distribution(params, logits) -> None:
    num = 20_000
    counts = draw_many(logits, params, num)
    expected = naive_kept(logits, params)
    assert set(counts) <= set(expected)
    chi_square = sum((counts[i] - num * p) ** 2 / (num * p) for i, p in expected.items())
    degrees = len(expected) - 1
    # Wilson and Hilferty: the cube root of a chi-square variable is nearly normal. Four sigma.
    spread = 2 / (9 * max(degrees, 1))
    assert chi_square < max(degrees, 1) * (1 - spread + 4 * math.sqrt(spread)) ** 3


def test_choices_and_seeds_have_streams_of_their_own() -> None:
    streams = {
        (seed, choice): tuple(uniform(seed, choice, position) for position in range(50))
        for seed in (0, 1, 2**63, -1)
        for choice in range(3)
    }
    numbers = [number for stream in streams.values() for number in stream]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.04


def test_the_stream_is_the_same_in_every_version() -> None:
    # A seed that a client noted must give the same answer after an upgrade.
    assert [round(uniform(7, 1, i), 12) for i in range(3)] == [0.270026581302, 0.541989052962, 0.556392965089]
    logits = torch.tensor([THREE_CHUNKS]).expand(8, -1)
    for params, wanted in (
        (SamplingParams(seed=7, choice=1), [35, 60, 146, 52, 140, 54, 125, 120]),
        (SamplingParams(seed=7, choice=1, top_k=20, top_p=0.9), [115, 133, 133, 134, 121, 147, 145, 139]),
    ):
        results = sample(logits, prepare([SampleRow(params, position) for position in range(8)]))
        assert [result.token_id for result in results] == wanted


def test_a_token_is_a_function_of_seed_choice_and_position_alone() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=11, choice=1)
    wanted = [sample(logits, prepare([SampleRow(params, position)]))[0].token_id for position in range(30)]
    # Backwards, and between rows of other requests: nothing carries over from call to call.
    for position in reversed(range(30)):
        other = SampleRow(SamplingParams(seed=position), 3)
        result = sample(logits.expand(3, -1), prepare([other, SampleRow(params, position), other]))[1]
        assert result.token_id == wanted[position]


def test_greedy_takes_the_lowest_id_among_the_largest() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0], [-1.0, -2.0, -3.0, -0.5]])
    assert [r.token_id for r in sample(logits, prepare([SampleRow(GREEDY, 0)] * 3))] == [1, 0, 3]


@pytest.mark.parametrize("temperature", [1e-9, 5e-324])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature) -> None:
    logits = torch.tensor([[0.0, 1e30, 3.0]])
    assert sample(logits, prepare([SampleRow(SamplingParams(temperature=temperature), 0)]))[0].token_id == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5), SamplingParams(top_p=0.9, logprobs=3)])
def test_row40_a_row_that_is_not_finite_fails_alone(poison, params) -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    rows = [SampleRow(params, position) for position in range(5)]
    healthy = sample(logits, prepare(rows))
    bad = logits.clone()
    bad[2, 7] = poison
    results = sample(bad, prepare(rows))
    assert results[2].error == NON_FINITE
    assert results[2].token_id is None
    assert [r for i, r in enumerate(results) if i != 2] == [r for i, r in enumerate(healthy) if i != 2]


def test_huge_finite_logits_are_not_taken_for_infinite() -> None:
    logits = torch.full((1, 8), 1e38)
    assert sample(logits, prepare([SampleRow(GREEDY, 0)]))[0].token_id == 0


def test_row40_all_rows_may_fail() -> None:
    results = sample(torch.full((2, 4), math.nan), prepare([SampleRow(GREEDY, 0), SampleRow(SamplingParams(), 0)]))
    assert [r.error for r in results] == [NON_FINITE] * 2


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_p=0.5), {0, 1}),  # half of four equals: reached, not exceeded
        (SamplingParams(top_p=0.75), {0, 1, 2}),
        (SamplingParams(top_k=3), {0, 1, 2}),
        (SamplingParams(top_k=2, top_p=0.5), {0}),
        (SamplingParams(min_p=1.0), {0, 1, 2, 3}),
        (SamplingParams(top_p=5e-324), {0}),
    ],
)
def test_filters_among_equals_keep_the_lowest_ids_and_no_more_than_needed(params, kept) -> None:
    assert set(draw_many([1.0, 1.0, 1.0, 1.0], params, 200)) == kept


@dataclass
class Allow:
    ids: Sequence[int]
    num_bytes: int = 4

    def bits(self) -> memoryview:
        return memoryview(sum(1 << i for i in self.ids).to_bytes(self.num_bytes, "little"))


class Broken:
    def bits(self) -> memoryview:
        raise ValueError("a grammar lost its way")


@given(st.sets(st.integers(0, 19), min_size=1), sampling_params)
def test_a_masked_row_yields_an_allowed_token(ids, params) -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(2))
    rows = [SampleRow(params, 0, Allow(sorted(ids))), SampleRow(params, 0)]
    masked, free = sample(logits, prepare(rows))
    assert masked.token_id in ids
    if params.top_k == 1:
        assert masked.token_id == max(ids, key=lambda i: float(logits[0, i]))
    assert free == sample(logits, prepare([rows[1]] * 2))[1]


def test_masks_do_not_change_log_probabilities_or_the_logits() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    params = SamplingParams(temperature=0, logprobs=1)
    result = sample(logits, prepare([SampleRow(params, 0, Allow([4, 9]))]))[0]
    assert torch.equal(logits, before)
    assert result.token_id in (4, 9)
    expected = torch.log_softmax(before[0], dim=-1)
    assert result.logprob.logprob == pytest.approx(float(expected[result.token_id]))
    assert result.logprob.top[0][0] == int(before.argmax())


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (Broken(), "a grammar lost its way"),
        (Allow([]), "allows no token"),
        (Allow([25]), "every token"),  # beyond the vocabulary, in the last word's padding
        (Allow([1], num_bytes=8), "8 bytes in place of 4"),
    ],
)
def test_a_mask_that_fails_ends_its_own_row_only(mask, error) -> None:
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(2))
    failed, healthy = sample(logits, prepare([SampleRow(GREEDY, 0, mask), SampleRow(GREEDY, 0)]))
    assert error in failed.error
    assert healthy.token_id == int(logits[1].argmax())


def test_masks_over_many_rows_and_words_keep_exactly_what_they_allow() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, 1000, generator=generator)
    allowed = [sorted({int(i) for i in torch.randint(1000, (7,), generator=generator)}) for _ in range(40)]
    masks = [Allow(ids, num_bytes=128) if row % 3 else None for row, ids in enumerate(allowed)]
    results = sample(logits, prepare([SampleRow(GREEDY, 0, mask) for mask in masks]))
    for row, (result, mask) in enumerate(zip(results, masks, strict=True)):
        among = range(1000) if mask is None else mask.ids
        assert result.token_id == max(among, key=lambda i: float(logits[row, i]))


@given(logits_rows, st.integers(0, 5), sampling_params)
def test_log_probabilities_are_of_the_raw_logits_whatever_the_filters(logits, k, params) -> None:
    result = sample(torch.tensor([logits]), prepare([SampleRow(replace(params, logprobs=k), 0)]))[0]
    total = math.log(math.fsum(math.exp(logit) for logit in logits))
    assert result.logprob.token_id == result.token_id
    assert result.logprob.logprob == pytest.approx(logits[result.token_id] - total, abs=1e-5)
    top = result.logprob.top
    assert len(top) == min(k, len(logits))
    assert [value for _, value in top] == pytest.approx(
        [logit - total for logit in sorted(logits, reverse=True)[:k]], abs=1e-5
    )
    assert list(top) == sorted(top, key=lambda pair: (-pair[1], pair[0]))


def test_log_probabilities_come_only_where_asked() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    asked = [SamplingParams(temperature=0, logprobs=k) for k in (None, 0, 4)]
    results = sample(logits, prepare([SampleRow(params, 0) for params in asked]))
    assert results[0].logprob is None
    assert results[1].logprob.top == ()
    assert len(results[2].logprob.top) == 4
