"""What parameters do to logits: their definitions, one row at a time, and nothing to the rows beside it."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.contract import SamplingParams
from mixtral_serve.model.logit_processors import ALL_FORBIDDEN, NOT_FINITE_ANY_MORE, SampleRow, adjust, wishes
from mixtral_serve.model.sampler import prepare, sample

VOCAB = 12
GREEDY = SamplingParams(temperature=0.0)
ids = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([0.0, 0.0, 0.5, -0.75, 2.0])

all_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 3]),
    seed=st.integers(0, 9),
    logprobs=st.sampled_from([2, 2, 2, None]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 1.0, 2.0, 0.5]),
    logit_bias=st.lists(st.tuples(ids, st.sampled_from([-100.0, -2.5, 1.0, 100.0])), max_size=3).map(tuple),
    allowed_token_ids=st.lists(ids, max_size=5, unique=True).map(tuple) | st.just(()),
    bad_words=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    min_tokens=st.integers(0, 4),
    suppressed_token_ids=st.lists(ids, max_size=2).map(tuple),
)
logit_rows = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=VOCAB, max_size=VOCAB)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    tokens = draw(st.lists(ids, min_size=1, max_size=12))
    return SampleRow(draw(all_params), draw(st.integers(0, len(tokens) - 1)), tokens=array("i", tokens))


def by_definition(logits: Sequence[float], row: SampleRow) -> list[float]:
    """The parameters as their documentation says, token by token."""
    params, known = row.params, list(row.tokens)
    output = known[len(known) - row.position :]
    adjusted = []
    for token_id, logit in enumerate(logits):
        value = logit
        if params.allowed_token_ids and token_id not in params.allowed_token_ids:
            value = -math.inf
        for word in params.bad_words:
            if token_id == word[-1] and [*output, token_id][-len(word) :] == list(word):
                value = -math.inf
        if len(output) < params.min_tokens and token_id in params.suppressed_token_ids:
            value = -math.inf
        value += sum(bias for biased_id, bias in params.logit_bias if biased_id == token_id)
        if token_id in known:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (token_id in output)
        adjusted.append(value)
    return adjusted


@given(logit_rows, sample_rows())
def test_logits_become_what_the_definitions_say(logits: list[float], row: SampleRow) -> None:
    tensor = torch.tensor([logits])
    (fault,) = adjust(tensor, [row])
    expected = by_definition(logits, row)
    assert tensor[0].tolist() == expected
    assert fault == (ALL_FORBIDDEN if max(expected) == -math.inf else None)
    assert wishes(row) or expected == logits


@given(st.lists(st.tuples(logit_rows, sample_rows()), min_size=1, max_size=6))
def test_a_rows_outcome_does_not_depend_on_its_batch_mates(batch: list[tuple[list[float], SampleRow]]) -> None:
    logits, rows = torch.tensor([logits for logits, _ in batch]), [row for _, row in batch]
    raw = logits.clone()
    together = sample(logits, prepare(rows))
    assert together == [sample(logits[i : i + 1], prepare([row]))[0] for i, row in enumerate(rows)]
    assert torch.equal(logits, raw), "the raw logits are not changed"


def test_bits_do_not_depend_on_batch_mates_with_ragged_histories_and_a_real_vocabulary() -> None:
    random = Random(1)
    vocab, rows = 1003, []
    for i in range(20):
        tokens = array("i", (random.randrange(vocab) for _ in range(random.randrange(1, 400))))
        params = SamplingParams(
            presence_penalty=random.uniform(-2, 2),
            frequency_penalty=random.uniform(-2, 2) if i % 3 else 0.0,
            repetition_penalty=random.uniform(0.5, 2) if i % 2 else 1.0,
            logit_bias=tuple((random.randrange(vocab), random.uniform(-9, 9)) for _ in range(i)),
        )
        rows.append(SampleRow(params, random.randrange(len(tokens)), tokens=tokens))
    logits = torch.randn(20, vocab, generator=torch.Generator().manual_seed(0)) * 5
    alone = [logits[i : i + 1].clone() for i in range(20)]
    for row_logits, row in zip(alone, rows, strict=True):
        adjust(row_logits, [row])
    for order in (list(range(20)), random.sample(range(20), 20), [5, 3, 19]):
        together = logits[order]
        adjust(together, [rows[i] for i in order])
        assert torch.equal(together, torch.cat([alone[i] for i in order]))


def test_rows_that_wish_for_nothing_are_left_out() -> None:
    assert not wishes(SampleRow(GREEDY, 3, tokens=[1, 2, 3, 4]))
    assert not wishes(SampleRow(replace(GREEDY, presence_penalty=1.0), 0, tokens=[1]))
    assert not wishes(SampleRow(replace(GREEDY, min_tokens=3, suppressed_token_ids=(2,)), 3, tokens=[1, 2, 3, 4]))
    assert not wishes(SampleRow(replace(GREEDY, min_tokens=3), 0, tokens=[1]))


def test_stop_tokens_are_sampled_only_once_min_tokens_others_were() -> None:
    params = replace(GREEDY, min_tokens=2, suppressed_token_ids=(1,))
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    chosen = [sample(logits, prepare([SampleRow(params, n, tokens=[0] * (1 + n))]))[0].token_id for n in range(4)]
    assert chosen == [2, 2, 1, 1]


def test_a_bad_word_is_never_completed_but_its_beginning_and_its_tail_are_free() -> None:
    params = replace(GREEDY, bad_words=((3, 4),))
    logits = torch.tensor([[0.0, 0.0, 0.0, 1.0, 9.0]])

    def next_after(prompt: list[int], output: list[int]) -> int | None:
        return sample(logits, prepare([SampleRow(params, len(output), tokens=prompt + output)]))[0].token_id

    assert next_after([1], []) == 4
    assert next_after([1], [3]) == 3
    assert next_after([1], [3, 3]) == 3
    assert next_after([1], [3, 2]) == 4
    assert next_after([3], []) == 4, "half of it lies in the prompt"


def test_each_row_gets_its_own_log_probabilities_whoever_was_adjusted() -> None:
    plain, biased = replace(GREEDY, logprobs=1), replace(GREEDY, logprobs=1, logit_bias=((0, 1.0),))
    logits = torch.tensor([[5.0, 0.0], [0.0, 1.5], [3.0, 3.5]])
    results = sample(logits, prepare([SampleRow(params, 0) for params in (biased, plain, biased)]))
    expected = torch.log_softmax(logits, dim=-1)
    assert [r.token_id for r in results] == [0, 1, 0]
    assert [r.logprob.logprob for r in results] == [float(expected[i, r.token_id]) for i, r in enumerate(results)]


def test_log_probabilities_are_of_the_raw_logits() -> None:
    params = replace(GREEDY, logprobs=2, logit_bias=((0, 100.0),), repetition_penalty=2.0, bad_words=((2,),))
    logits = torch.tensor([[0.0, 1.0, 3.0]])
    (chosen,) = sample(logits, prepare([SampleRow(params, 1, tokens=[1, 2])]))
    expected = torch.log_softmax(logits[0], dim=-1)
    assert (chosen.token_id, chosen.logprob.token_id) == (0, 0)
    assert chosen.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token_id for token_id, _ in chosen.logprob.top] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"allowed_token_ids": (1, 2), "bad_words": ((1,), (2,))}, ALL_FORBIDDEN),
        ({"allowed_token_ids": (1,), "min_tokens": 9, "suppressed_token_ids": (1,)}, ALL_FORBIDDEN),
        ({"repetition_penalty": 1e-45}, NOT_FINITE_ANY_MORE),
        ({"logit_bias": ((1, math.nan),)}, NOT_FINITE_ANY_MORE),
    ],
)
def test_parameters_that_leave_no_token_end_their_own_row_only(changes: dict[str, object], fault: str) -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]] * 3)
    tokens = [1, 2, 2]
    bad = SampleRow(replace(GREEDY, **changes), 1, tokens=tokens)  # type: ignore[arg-type]
    good = SampleRow(replace(GREEDY, presence_penalty=5.0), 1, tokens=tokens)
    results = sample(logits, prepare([good, bad, SampleRow(GREEDY, 1, tokens=tokens)]))
    assert [(r.token_id, r.error) for r in results] == [(1, None), (None, fault), (2, None)]


class Allow:
    def __init__(self, allowed: Sequence[int]) -> None:
        self._allowed = allowed

    def bits(self) -> memoryview:
        return memoryview(sum(1 << token_id for token_id in self._allowed).to_bytes(4, "little"))


def test_a_mask_and_parameters_forbid_together() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2)
    params = replace(GREEDY, bad_words=((2,),), logit_bias=((3, 50.0),))
    within, nothing = SampleRow(params, 0, Allow([1, 2])), SampleRow(params, 0, Allow([2]))
    assert [(r.token_id, r.error) for r in sample(logits, prepare([within, nothing]))] == [
        (1, None),
        (None, ALL_FORBIDDEN),
    ]


def test_penalties_of_64_long_contexts_take_milliseconds() -> None:
    random = Random(0)
    tokens = [array("i", (random.randrange(32_000) for _ in range(4000))) for _ in range(64)]
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1)
    rows = [SampleRow(params, 2000, tokens=history) for history in tokens]
    logits = torch.randn(64, 32_000)
    best_s = math.inf
    for _ in range(5):
        started_s = time.perf_counter()
        adjust(logits, rows)
        best_s = min(best_s, time.perf_counter() - started_s)
    assert best_s < 0.05
