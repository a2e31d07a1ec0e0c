"""The fake runner is honest about its KV cache, and does what its script says."""

from __future__ import annotations

from pathlib import Path

import pytest

import mixtral_serve.demo
from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.engine.fakes import FakeRunner, FakeScript, Fault, byte_ids, byte_vocabulary
from scheduler.lifecycle import FinishReason
from scheduler.plan import ScheduledSlice, SliceResult, StepPlan
from scheduler.request import BlockId, RequestId

GREEDY = SamplingParams(temperature=0.0)
TOKENS = (1, *byte_ids("abcdefg"))


def run_slice(runner: FakeRunner, table: list[int], start: int = 0, num_tokens: int = len(TOKENS)) -> SliceResult:
    end = start + num_tokens
    scheduled = ScheduledSlice(
        request_id=RequestId("a"),
        start=start,
        num_tokens=num_tokens,
        tokens=TOKENS,
        block_table=[BlockId(block) for block in table],
        num_logits=1 if end == len(TOKENS) else 0,
        samples=end == len(TOKENS),
        num_output_tokens=0,
    )
    (result,) = runner.run(RunBatch(StepPlan(0, (scheduled,), ()), (GREEDY,))).results
    return result


def test_the_token_depends_on_what_the_block_table_leads_to_and_not_on_where_it_lies():
    script = FakeScript(num_blocks=8, block_size=4)
    (expected,) = FakeRunner(script).reference(TOKENS, GREEDY, 1)
    assert run_slice(FakeRunner(script), [1, 2]).token_id == expected
    assert run_slice(FakeRunner(script), [7, 3]).token_id == expected
    chunked = FakeRunner(script)
    assert run_slice(chunked, [5, 2], 0, 5).token_id is None
    assert run_slice(chunked, [5, 2], 5, 3).token_id == expected


@pytest.mark.parametrize("output", [None, "scripted"])
def test_a_wrong_block_table_shows_in_the_output(output):
    script = FakeScript(num_blocks=8, block_size=4, output=output)
    runner = FakeRunner(script)
    run_slice(runner, [5, 2], 0, 5)
    result = run_slice(runner, [4, 2], 5, 3)  # the first block is not the one that was written
    if output is None:
        assert result.token_id != runner.reference(TOKENS, GREEDY, 1)[0]
    else:
        assert result.finish is FinishReason.ERROR
        assert "KV cache" in (result.error or "")


def test_every_byte_has_a_token_and_only_control_tokens_are_special():
    table = byte_vocabulary()
    assert b"".join(table[token_id] for token_id in byte_ids("Grüße 🙂")).decode() == "Grüße 🙂"
    assert [table.is_special(token_id) for token_id in range(5)] == [True, True, True, False, False]


def test_echo_says_the_prompt_again(new_driver):
    driver = new_driver(FakeScript(echo=True))
    driver.submit("a", "Grüße", max_tokens=50)
    driver.run()
    assert (driver.text("a"), driver.end("a")) == ("Grüße", "stop")


def test_scripted_text_under_the_tokenizer_of_a_checkpoint(new_driver):
    checkpoint = Path(mixtral_serve.demo.__file__).parent / "checkpoint"
    driver = new_driver(FakeScript(output="Paris is the capital.", tokenizer=str(checkpoint)))
    driver.submit("a", [1], max_tokens=50, strip_leading_space=True)
    driver.run()
    assert driver.text("a") == "Paris is the capital."
    assert driver.last("a").num_output_tokens < 20, "several characters a token"


def test_a_nan_step_fails_all_of_its_requests_and_a_hang_is_what_the_test_says(new_driver):
    driver = new_driver(FakeScript(faults={1: Fault.NAN}, output="ok"))
    driver.submit("a")
    driver.submit("b")
    driver.run()
    assert (driver.end("a"), driver.end("b")) == ("error", "error")

    hangs: list[int] = []
    script = FakeScript(faults={2: Fault.HANG}, output="ok")
    runner = FakeRunner(script, hang=lambda: hangs.append(runner.num_steps))
    driver = new_driver(script, runner=runner)
    driver.submit("a")
    driver.run()
    assert (hangs, driver.text("a")) == ([2], "ok")
