"""Early refusals, ``max_tokens`` and an honest Retry-After."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.contract import ModelInfo, SamplingParams
from mixtral_serve.engine.admission import (
    COMPLETION_DEFAULT_MAX_TOKENS,
    FinishRate,
    check_submits,
    limit_for,
    num_waiting,
    resolve_max_tokens,
)
from mixtral_serve.engine.errors import EngineError, PromptTooLong, TokenOutOfRange
from mixtral_serve.engine.fakes import FakeScript, fake_parts
from mixtral_serve.engine.messages import EngineStats
from scheduler.request import RequestKind


def info_of(**fields: int) -> ModelInfo:
    return fake_parts(FakeScript(**fields)).runner.info


INFO = info_of(num_blocks=5, block_size=4, max_model_len=64)  # 16 tokens per request


@given(num_blocks=st.integers(2, 30), block_size=st.integers(1, 8), max_model_len=st.integers(1, 100))
def test_row41_the_limit_is_the_schedulers_own_formula(num_blocks, block_size, max_model_len):
    parts = fake_parts(FakeScript(num_blocks=num_blocks, block_size=block_size, max_model_len=max_model_len))
    assert limit_for(parts.runner.info) == parts.scheduler.config.max_tokens_per_request


@given(num_prompt_tokens=st.integers(1, 20), max_tokens=st.integers(0, 20))
def test_row41_admission_and_engine_agree_on_every_size(submit_of, new_driver, num_prompt_tokens, max_tokens):
    request = submit_of("a", [3] * num_prompt_tokens, max_tokens=max_tokens)
    driver = new_driver(FakeScript(num_blocks=5, block_size=4, max_model_len=64, never_ends=True))
    driver.core.handle([request])
    driver.run()
    if num_prompt_tokens + max_tokens <= 16:
        check_submits([request], INFO)
        assert driver.end("a") == "length"
        return
    with pytest.raises(PromptTooLong) as caught:
        check_submits([request], INFO)
    assert caught.value.limit == 16
    assert caught.value.max_tokens == (None if num_prompt_tokens + min(max_tokens, 1) > 16 else max_tokens)
    assert driver.last("a").refusal == "RequestTooLargeError"


def test_max_tokens_is_kept_or_refused_when_given_and_fitted_when_not():
    assert resolve_max_tokens(INFO, 4, None, default=None) == 12
    assert resolve_max_tokens(INFO, 4, None, default=COMPLETION_DEFAULT_MAX_TOKENS) == 12
    assert resolve_max_tokens(INFO, 4, None, default=5) == 5
    assert resolve_max_tokens(INFO, 4, 12, default=None) == 12
    assert resolve_max_tokens(INFO, 16, 0, default=None) == 0
    with pytest.raises(PromptTooLong, match="17 tokens in the prompt\\."):
        resolve_max_tokens(INFO, 17, 0, default=None)
    with pytest.raises(PromptTooLong, match=r"limit|maximum context length is 16 tokens.*4 tokens.*13 in the"):
        resolve_max_tokens(INFO, 4, 13, default=None)
    with pytest.raises(PromptTooLong, match="16 tokens in the prompt\\."):
        resolve_max_tokens(INFO, 16, None, default=None)


def test_score_and_embed_may_fill_the_whole_limit(submit_of):
    check_submits([submit_of("a", [3] * 16, max_tokens=0, kind=RequestKind.EMBED)], INFO)
    with pytest.raises(PromptTooLong):
        check_submits([submit_of("a", [3] * 17, max_tokens=0, kind=RequestKind.EMBED)], INFO)


@pytest.mark.parametrize("token_id", [-1, 259, 2**31 - 1, -(2**31)])
def test_row17_ids_outside_the_vocabulary_are_refused_by_name(submit_of, token_id):
    with pytest.raises(TokenOutOfRange, match=str(token_id)) as caught:
        check_submits([submit_of("a", [3, token_id], max_tokens=1)], INFO)
    assert caught.value.param == "prompt"
    with pytest.raises(TokenOutOfRange) as caught:
        check_submits([submit_of("a", max_tokens=1, stop_token_ids=(3, token_id))], INFO)
    assert caught.value.param == "stop_token_ids"
    for field, value in (
        ("logit_bias", ((3, 0.5), (token_id, 0.5))),
        ("allowed_token_ids", (3, token_id)),
        ("bad_words", ((3,), (3, token_id))),
    ):
        with pytest.raises(TokenOutOfRange) as caught:
            check_submits([submit_of("a", max_tokens=1, sampling=SamplingParams(**{field: value}))], INFO)
        assert caught.value.param == field


def test_the_largest_id_is_fine_and_one_bad_choice_refuses_all(submit_of):
    good = submit_of("a", [258, 0], max_tokens=1, stop_token_ids=(258,))
    check_submits([good, good], INFO)
    with pytest.raises(EngineError):
        check_submits([good, submit_of("b", [259], max_tokens=1)], INFO)


def test_waiting_counts_newcomers_and_leaves_the_seats_of_an_idle_engine_alone():
    idle = EngineStats()
    assert num_waiting(idle, 8, max_num_seqs=8) == 0
    assert num_waiting(idle, 10, max_num_seqs=8) == 2
    short_of_memory = EngineStats(num_running=3, num_waiting=2)
    assert num_waiting(short_of_memory, 7, max_num_seqs=8) == 4


def test_row66_the_refused_are_told_times_that_spread_at_the_rate_at_which_places_become_free():
    rate = FinishRate()
    assert rate.retry_after_s(0.0) == 5.0  # nothing is known yet
    rate = FinishRate()
    for i in range(10):
        rate.note_finished(2.0 * i)
    assert [rate.retry_after_s(20.0) for _ in range(4)] == [2.0, 4.0, 6.0, 8.0]
    rate.note_finished(20.0, 4)  # four places became free
    assert rate.retry_after_s(20.0) < 2.0
    for _ in range(200):
        last = rate.retry_after_s(20.0)
    assert last == 120.0, "official clients do not wait longer"


def test_retry_after_grows_when_the_engine_ends_nothing_any_more():
    rate = FinishRate()
    rate.note_finished(0.0)
    rate.note_finished(1.0)
    assert rate.retry_after_s(100.0) == 50.0
