"""What parameters do in the engine: warm-ups, scores, progress, suppressed tokens and what they weigh."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.engine.fakes import EOS_TOKEN_ID, FakeRunner, FakeScript, byte_ids
from mixtral_serve.engine.parameters import extra_bytes
from scheduler.plan import StepResult
from scheduler.request import RequestKind

GREEDY = SamplingParams(temperature=0.0)
CHUNKED = FakeScript(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, never_ends=True)


class Spy(FakeRunner):
    """Remembers the parameters of each slice it ran."""

    def __init__(self, script: FakeScript) -> None:
        super().__init__(script)
        self.seen: list[SamplingParams] = []

    def run(self, batch: RunBatch) -> StepResult:
        self.seen.extend(batch.sampling)
        return super().run(batch)


def test_a_request_for_no_token_warms_the_prefix_cache(new_driver):
    driver = new_driver(CHUNKED)
    prompt = [1, *byte_ids("x" * 30)]
    driver.submit("warm", prompt, max_tokens=0)
    driver.run()
    warm = driver.last("warm")
    assert (warm.finish_reason, warm.num_output_tokens, warm.num_cached_tokens) == ("length", 0, 0)
    assert (driver.text("warm"), driver.tokens("warm")) == ("", [])
    driver.submit("hit", prompt, max_tokens=3)
    driver.run()
    assert driver.last("hit").num_cached_tokens == 28
    assert driver.tokens("hit") == driver.fake.reference(prompt, GREEDY, 3)
    driver.submit("again", prompt, max_tokens=0)
    driver.run()
    assert (driver.end("again"), driver.last("again").num_cached_tokens) == ("length", 28)


def test_scoring_while_generating_gives_both_and_the_prompt_first(new_driver):
    driver = new_driver(CHUNKED)
    prompt = [1, *byte_ids("x" * 20)]
    driver.submit("both", prompt, max_tokens=4, sampling=replace(GREEDY, prompt_logprobs=1, logprobs=2))
    driver.submit("only", prompt, max_tokens=0, sampling=replace(GREEDY, prompt_logprobs=1))
    driver.submit("score", prompt, max_tokens=0, kind=RequestKind.SCORE, sampling=replace(GREEDY, prompt_logprobs=1))
    driver.run()
    scored = {
        name: [entry for delta in driver.deltas[name] for entry in delta.prompt_logprobs]
        for name in ("both", "only", "score")
    }
    assert [entry.token_id for entry in scored["both"]] == prompt[1:]
    assert scored["both"] == scored["only"] == scored["score"]
    assert driver.tokens("both") == driver.fake.reference(prompt, GREEDY, 4)
    kinds = [bool(delta.token_ids) for delta in driver.deltas["both"] if delta.prompt_logprobs or delta.token_ids]
    assert kinds == sorted(kinds)
    assert {driver.end(name) for name in scored} == {"length"}


def progress(driver, name: str) -> list[int]:
    return [delta.num_prompt_tokens_done for delta in driver.deltas.get(name, ()) if delta.num_prompt_tokens_done]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 3},
        {"max_tokens": 0},
        {"max_tokens": 0, "kind": RequestKind.EMBED},
        {"max_tokens": 0, "kind": RequestKind.SCORE},
    ],
)
def test_progress_is_told_for_each_step_that_leaves_some_of_the_prompt(new_driver, fields):
    driver = new_driver(CHUNKED)
    driver.submit("told", "x" * 30, report_progress=True, **fields)
    driver.submit("untold", "y" * 30, **fields)
    driver.run()
    assert progress(driver, "told") == [8, 16, 24]
    assert progress(driver, "untold") == []
    assert all(d.token_ids or d.prompt_logprobs or d.finish_reason for d in driver.deltas["untold"]), "no empty delta"


def test_progress_counts_what_the_cache_had(new_driver):
    driver = new_driver(CHUNKED)
    driver.submit("warm", "x" * 30, max_tokens=0)
    driver.run()
    driver.submit("told", "x" * 30 + "y" * 20, max_tokens=1, report_progress=True)
    driver.run()
    assert progress(driver, "told") == [36, 44]


@given(
    num_blocks=st.integers(8, 14),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    max_tokens=st.integers(0, 8),
)
def test_progress_rises_and_stays_below_the_prompt_whatever_is_preempted(new_driver, num_blocks, lengths, max_tokens):
    script = replace_script(CHUNKED, num_blocks=num_blocks)
    driver = new_driver(script)
    for i, length in enumerate(lengths):
        driver.submit(f"r{i}", [3 + i] * length, max_tokens=max_tokens, report_progress=True)
    driver.run()
    for i, length in enumerate(lengths):
        told = progress(driver, f"r{i}")
        assert told == sorted(set(told))
        assert all(0 < done < length for done in told)
        begun = False
        for delta in driver.deltas[f"r{i}"]:
            begun = begun or bool(delta.token_ids)
            assert not (begun and delta.num_prompt_tokens_done), "no progress once the output has begun"


def replace_script(script: FakeScript, **fields: int) -> FakeScript:
    return FakeScript(**{name: getattr(script, name) for name in script.__struct_fields__} | fields)


def test_the_sampler_is_told_which_tokens_end_the_request_before_min_tokens(new_driver):
    runner = Spy(FakeScript(output="abcdef"))
    driver = new_driver(runner=runner)
    cases = {
        (EOS_TOKEN_ID, 7, 9): {"stop_token_ids": (9, 7), "min_tokens": 2},
        (7,): {"stop_token_ids": (7,), "min_tokens": 2, "ignore_eos": True},
        (): {"stop_token_ids": (7,)},
    }
    for suppressed, fields in cases.items():
        runner.seen.clear()
        driver.submit(f"{len(driver.deltas)}", max_tokens=3, **fields)
        driver.run()
        assert {params.suppressed_token_ids for params in runner.seen} == {suppressed}
        assert {params.min_tokens for params in runner.seen} == {fields.get("min_tokens", 0)}


def test_what_parameters_weigh_is_set_aside_for_as_long_as_the_request_lives(new_driver):
    driver = new_driver(FakeScript(requests_budget_bytes=10**9, never_ends=True))
    heavy = {
        "logit_bias": tuple((i % 200, 0.5) for i in range(1024)),
        "allowed_token_ids": tuple(range(200)),
        "bad_words": tuple((3, 4 + i) for i in range(100)),
    }
    weights = []
    for name, params in {"plain": {}, **{field: {field: value} for field, value in heavy.items()}}.items():
        driver.submit(name, max_tokens=2, sampling=SamplingParams(**params))
        weights.append(driver.tick().stats.reserved_bytes)
        driver.run()
        assert driver.last_tick.stats.reserved_bytes == 0
    plain, bias, allowed, words = weights
    assert bias - plain >= 1024 * (56 + 8 + 32 + 24)
    assert allowed - plain >= 200 * (8 + 32)
    assert words - plain >= 100 * (8 + 56 + 2 * 32)


def test_scores_weigh_whether_they_come_by_kind_or_by_parameter(submit_of):
    by_kind = submit_of("a", max_tokens=0, kind=RequestKind.SCORE)
    by_parameter = submit_of("a", max_tokens=0, sampling=SamplingParams(prompt_logprobs=0))
    assert extra_bytes(1000, by_kind) == extra_bytes(1000, by_parameter) >= 1000 * 200
    assert extra_bytes(1000, submit_of("a", max_tokens=0)) == 0


def test_a_stop_string_that_half_a_character_completes_ends_with_stop(new_driver):
    ids = byte_ids("aé")[:2]  # the limit cuts the second character
    driver = new_driver(FakeScript(output_ids=ids))
    driver.submit("cut", max_tokens=2, stop=("\ufffd",))
    driver.submit("whole", max_tokens=2)
    driver.submit("left", max_tokens=20, stop=("\ufffd",))
    driver.tick()
    driver.tick()
    driver.cancel("left")  # with half a character held back
    driver.run()
    assert (driver.text("cut"), driver.end("cut")) == ("a", "stop")
    assert (driver.text("whole"), driver.end("whole")) == ("a\ufffd", "length")
    assert (driver.text("left"), driver.end("left")) == ("a", "cancelled")
    assert driver.tokens("cut") == driver.tokens("left") == list(ids)
