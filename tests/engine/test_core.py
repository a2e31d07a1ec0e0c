"""The engine core: every submit ends exactly once, and a fault stays where it happened."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.engine.core import model_info
from mixtral_serve.engine.fakes import FAKE_VOCAB_SIZE, FakeRunner, FakeScript, Fault, byte_ids, fake_parts
from mixtral_serve.engine.messages import Shutdown, Submit
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.errors import ProtocolError
from scheduler.plan import StepResult
from scheduler.request import RequestKind

SMALL = FakeScript(num_blocks=24, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, never_ends=True)
POISON = byte_ids("!")[0]


def test_an_idle_core_has_nothing_to_do_and_nothing_to_say(new_driver):
    driver = new_driver()
    assert not driver.core.has_work
    assert driver.tick() is None


def test_a_tick_carries_deltas_numbers_and_times(new_driver):
    driver = new_driver(SMALL)
    driver.submit("a", "abcd", max_tokens=3)
    tick = driver.tick()
    assert [d.request_id for d in tick.deltas] == ["a"]
    assert (tick.stats.num_running, tick.stats.num_waiting, tick.stats.num_prompt_tokens) == (1, 0, 5)
    assert tick.stats.num_used_blocks == 2
    assert tick.stats.num_blocks == 23
    assert (tick.timing.num_tokens, tick.timing.num_slices, tick.timing.step_id) == (5, 1, 0)
    driver.run()
    assert driver.last_tick.stats.num_generation_tokens == 3
    assert driver.last_tick.stats.num_steps == 3
    assert driver.last("a").num_output_tokens == 3
    assert driver.end("a") == "length"


def test_i25_i27_outputs_equal_the_reference_under_chunks_preemption_and_prefix_hits(new_driver):
    driver = new_driver(SMALL)
    prompts = {f"r{i}": "the same beginning, then "[: 8 + i] * 2 + str(i) for i in range(12)}
    for request_id, prompt in prompts.items():
        driver.submit(request_id, prompt, max_tokens=20)
        driver.tick()
    driver.run()
    assert driver.last_tick.stats.num_preemptions > 0
    assert driver.last_tick.stats.num_prefix_hit_tokens > 0
    for request_id, prompt in prompts.items():
        assert driver.tokens(request_id) == driver.fake.reference(
            [1, *byte_ids(prompt)], SamplingParams(temperature=0.0), 20
        )
        assert driver.end(request_id) == "length"


def test_i26_a_token_is_a_function_of_seed_choice_and_position_only(new_driver):
    sampled = [SamplingParams(seed=seed, choice=choice) for seed in (0, 7, 2**63) for choice in (0, 1)]
    alone = []
    for params in sampled:
        driver = new_driver(SMALL)
        driver.submit("a", sampling=params, max_tokens=12)
        driver.run()
        alone.append(driver.tokens("a"))
    together = new_driver(SMALL)
    for i, params in enumerate(sampled):
        together.submit(f"r{i}", sampling=params, max_tokens=12)
    together.run()
    assert [together.tokens(f"r{i}") for i in range(len(sampled))] == alone
    assert len(set(map(tuple, alone))) == len(sampled)


def test_i28_max_tokens_is_never_exceeded_and_end_of_sequence_ends(new_driver):
    driver = new_driver(FakeScript(output="four"))
    driver.submit("cut", max_tokens=3)
    driver.submit("whole", max_tokens=9)
    driver.submit("on", max_tokens=9, ignore_eos=True)
    driver.run()
    assert (driver.text("cut"), driver.end("cut")) == ("fou", "length")
    assert (driver.text("whole"), driver.end("whole"), driver.last("whole").num_output_tokens) == ("four", "stop", 5)
    assert (driver.text("on"), driver.end("on"), driver.last("on").num_output_tokens) == ("four", "length", 9)


def test_row33_i24_cancel_is_legal_in_every_state_twice_and_for_unknown_ids(new_driver):
    driver = new_driver(SMALL)
    driver.cancel("unknown")
    assert driver.tick() is None
    for i in range(6):  # four run, two wait
        driver.submit(f"r{i}", "x" * 10, max_tokens=40)
    driver.cancel("r5")
    for _ in range(4):
        driver.tick()
    driver.cancel("r0", "r4", "r0", "r5")
    tick = driver.tick()
    assert {d.request_id: d.finish_reason for d in tick.deltas if d.finish_reason} == {
        "r0": "cancelled",
        "r4": "cancelled",
    }
    driver.run()
    driver.cancel("r0", "r1")
    assert driver.tick() is None
    for survivor in ("r1", "r2", "r3"):
        assert driver.tokens(survivor) == driver.fake.reference(
            [1, *byte_ids("x" * 10)], SamplingParams(temperature=0.0), 40
        )


def test_row29_row30_a_cancelled_request_holds_no_block_after_one_step(new_driver):
    for num_ticks in (1, 2, 6):  # in its prompt, at its first token, in its answer
        driver = new_driver(SMALL)
        driver.submit("a", "x" * 30, max_tokens=40)
        for _ in range(num_ticks):
            driver.tick()
        assert driver.scheduler.stats().num_used_blocks > 0
        driver.cancel("a")
        tick = driver.tick()
        assert (tick.stats.num_used_blocks, tick.timing) == (0, None)
        assert driver.end("a") == "cancelled"
        driver.assert_quiet()


def test_row32_a_queued_request_that_is_cancelled_is_never_computed(new_driver):
    driver = new_driver(FakeScript(max_num_seqs=1, never_ends=True))
    driver.submit("runs", max_tokens=10)
    driver.submit("waits", "never seen", max_tokens=10)
    driver.tick()
    driver.cancel("waits")
    driver.run()
    assert driver.end("waits") == "cancelled"
    assert driver.last_tick.stats.num_prompt_tokens == 3  # of the other one


@pytest.mark.parametrize("cancel_before_tick", range(6))
def test_row34_a_cancel_that_races_with_the_end_gives_one_terminal_delta(new_driver, cancel_before_tick):
    driver = new_driver(FakeScript(never_ends=True))
    driver.submit("a", max_tokens=4)
    for tick in range(6):
        if tick == cancel_before_tick:
            driver.cancel("a")
        driver.tick()
    assert driver.end("a") == ("cancelled" if cancel_before_tick < 4 else "length")


def test_row36_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(new_driver):
    driver = new_driver(FakeScript(faults={2: Fault.RAISE}, never_ends=True, max_num_seqs=2))
    for name in ("a", "b", "later"):
        driver.submit(name, max_tokens=5)
    driver.tick()
    tick = driver.tick()
    assert {d.request_id: d.finish_reason for d in tick.deltas} == {"a": "error", "b": "error"}
    assert "RuntimeError" in driver.last("a").error
    assert tick.stats.num_failed_steps == 1
    assert tick.stats.num_used_blocks == 0
    driver.run()
    assert driver.end("later") == "length"
    assert not driver.core.is_broken


def test_row37_a_runner_that_always_raises_is_reported_as_broken(new_driver):
    driver = new_driver(FakeScript(faults=dict.fromkeys((1, 2, 4, 5, 6), Fault.RAISE), max_num_seqs=1))
    for i in range(9):
        driver.submit(f"r{i}", max_tokens=1)
    for _ in range(5):
        driver.tick()
    assert not driver.core.is_broken, "the third step worked, so it counts from there"
    driver.tick()
    assert driver.core.is_broken
    assert [driver.end(f"r{i}") for i in range(6)] == ["error", "error", "length", "error", "error", "error"]


def test_row40_a_request_with_bad_logits_fails_alone_and_its_blocks_leave_the_cache(new_driver):
    script = FakeScript(poison={POISON: Fault.NAN}, block_size=4, max_num_seqs=2, max_num_batched_tokens=8)
    driver = new_driver(msgspec.structs.replace(script, never_ends=True))
    driver.submit("bad", "shared prefix !", max_tokens=5)  # two chunks: the first is published, then taken back
    driver.submit("good", "another one", max_tokens=5)
    driver.run()
    assert (driver.end("bad"), driver.last("bad").error) == ("error", "non-finite logits")
    assert driver.end("good") == "length"
    driver.submit("after", "shared prefix ?", max_tokens=5)
    driver.run()
    assert driver.last("after").num_cached_tokens == 0
    assert driver.end("after") == "length"


def test_row41_the_largest_request_is_served_and_one_token_more_is_refused(new_driver):
    driver = new_driver(FakeScript(num_blocks=5, block_size=4, never_ends=True))
    limit = 16
    for num_prompt_tokens, max_tokens in ((limit - 1, 1), (1, limit - 1), (limit, 1), (limit - 1, 2), (limit + 1, 1)):
        name = f"{num_prompt_tokens}+{max_tokens}"
        driver.submit(name, [5] * num_prompt_tokens, max_tokens=max_tokens)
        driver.run()
        if num_prompt_tokens + max_tokens <= limit:
            assert driver.end(name) == "length"
        else:
            assert (driver.end(name), driver.last(name).refusal) == ("error", "RequestTooLargeError")


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"max_tokens": -1}, "InvalidRequestError"),
        ({"prompt": []}, "InvalidRequestError"),
        ({"min_tokens": 17}, "InvalidRequestError"),
        ({"prompt": [FAKE_VOCAB_SIZE]}, "TokenOutOfRange"),
        ({"prompt": [-1]}, "TokenOutOfRange"),
        ({"stop_token_ids": (FAKE_VOCAB_SIZE,)}, "TokenOutOfRange"),
        ({"sampling": SamplingParams(logit_bias=((5, 1.0), (-1, 1.0)))}, "TokenOutOfRange"),
        ({"sampling": SamplingParams(allowed_token_ids=(FAKE_VOCAB_SIZE,))}, "TokenOutOfRange"),
        ({"sampling": SamplingParams(bad_words=((1, FAKE_VOCAB_SIZE),))}, "TokenOutOfRange"),
        ({"sampling": SamplingParams(bad_words=((1,), ()))}, "InvalidRequestError"),
        ({"kind": RequestKind.EMBED, "max_tokens": 5}, "InvalidRequestError"),
        ({"stop": ("",)}, None),
    ],
)
def test_row17_what_slipped_through_admission_is_refused_and_its_neighbour_is_unchanged(new_driver, fields, refusal):
    driver = new_driver(SMALL)
    driver.submit("victim", max_tokens=10)
    driver.tick()
    driver.submit("bad", **fields)
    driver.run()
    assert (driver.end("bad"), driver.last("bad").refusal) == ("error", refusal)
    assert driver.tokens("victim") == driver.fake.reference([1, *byte_ids("Hi")], SamplingParams(temperature=0.0), 10)


def test_a_prompt_of_broken_bytes_is_refused(new_driver):
    driver = new_driver()
    driver.core.handle([Submit(request_id="bad", prompt=b"abc", arrival_s=0.0, max_tokens=1)])
    driver.run()
    assert (driver.end("bad"), driver.last("bad").refusal) == ("error", None)


def test_a_full_queue_refuses_and_a_live_id_cannot_be_taken_over(new_driver):
    driver = new_driver(FakeScript(max_waiting=2, max_num_seqs=1, never_ends=True))
    for i in range(3):
        driver.submit(f"r{i}", max_tokens=3)
    driver.run()
    assert driver.last("r2").refusal == "QueueFullError"
    assert driver.end("r0") == driver.end("r1") == "length"


class BrokenTable(TokenBytes):
    """A table with an entry that cannot be read."""

    def __getitem__(self, token_id: int) -> bytes:
        if token_id == byte_ids("b")[0]:
            raise KeyError(token_id)
        return super().__getitem__(token_id)


def test_a_text_that_cannot_be_made_ends_its_own_request_only(new_driver):
    table = BrokenTable(dict.fromkeys(range(FAKE_VOCAB_SIZE), b"x"))
    driver = new_driver(FakeScript(echo=True), table=table)
    driver.submit("bad", "aabaa")
    driver.submit("good", "aacaa")
    driver.run()
    assert driver.end("bad") == "error"
    assert "text" in driver.last("bad").error
    assert (driver.end("good"), driver.text("good")) == ("stop", "xxxxx")


def test_a_deadline_ends_a_request_wherever_it_is(new_driver):
    driver = new_driver(FakeScript(max_num_seqs=1, never_ends=True))
    driver.submit("runs", max_tokens=50, deadline_s=0.055)
    driver.submit("waits", max_tokens=50, deadline_s=0.035)
    driver.run()
    assert (driver.end("runs"), driver.end("waits")) == ("deadline", "deadline")
    assert len(driver.tokens("runs")) == 5
    assert driver.tokens("waits") == []


def test_scores_come_once_per_position_and_count_no_output(new_driver):
    driver = new_driver(SMALL)
    driver.submit("s", "x" * 30, kind=RequestKind.SCORE, max_tokens=0, sampling=SamplingParams(prompt_logprobs=2))
    driver.run()
    scored = [entry for delta in driver.deltas["s"] for entry in delta.prompt_logprobs]
    assert [entry.token_id for entry in scored] == list(byte_ids("x" * 30))
    assert all(len(entry.top) == 2 for entry in scored)
    assert (driver.end("s"), driver.last("s").num_output_tokens) == ("length", 0)


def test_an_embedding_comes_with_the_last_delta(new_driver):
    alone = new_driver(FakeScript())
    alone.submit("e", "x" * 30, kind=RequestKind.EMBED, max_tokens=0)
    alone.run()
    chunked = new_driver(SMALL)
    chunked.submit("e", "x" * 30, kind=RequestKind.EMBED, max_tokens=0)
    chunked.run()
    assert chunked.last("e").embedding == alone.last("e").embedding
    assert len(chunked.last("e").embedding) == 8
    assert chunked.end("e") == "stop"


def test_logprobs_are_aligned_with_tokens_where_asked_for(new_driver):
    driver = new_driver()
    driver.submit("a", sampling=SamplingParams(temperature=0.0, logprobs=3), max_tokens=5)
    driver.submit("b", max_tokens=5)
    driver.run()
    for delta in driver.deltas["a"]:
        assert tuple(entry.token_id for entry in delta.logprobs) == delta.token_ids
        assert all(len(entry.top) == 3 for entry in delta.logprobs)
    assert all(delta.logprobs == () for delta in driver.deltas["b"])


def test_shutdown_ends_whatever_lives(new_driver):
    driver = new_driver(SMALL)
    for i in range(6):
        driver.submit(f"r{i}", max_tokens=40)
    driver.tick()
    driver.core.handle([Shutdown()])
    assert driver.core.is_shut_down
    driver.run()
    assert {driver.end(f"r{i}") for i in range(6)} == {"cancelled"}


class ShortAnswerRunner(FakeRunner):
    """Breaks the protocol: forgets the last slice."""

    def run(self, batch: RunBatch) -> StepResult:
        return StepResult(super().run(batch).results[:-1])


def test_row37_a_broken_protocol_is_not_contained(new_driver):
    driver = new_driver(runner=ShortAnswerRunner())
    driver.submit("a")
    with pytest.raises(ProtocolError):
        driver.tick()


def test_admission_hears_of_the_tighter_of_two_limits():
    parts = fake_parts(FakeScript(max_model_len=64))
    roomy = FakeRunner(FakeScript(max_model_len=4096))
    assert model_info(roomy, parts.scheduler).max_model_len == 64
    assert model_info(parts.runner, parts.scheduler).num_blocks == parts.scheduler.config.num_blocks


def test_row47_a_long_mixed_life_leaves_nothing_behind(new_driver):
    driver = new_driver(FakeScript(num_blocks=20, block_size=4, max_num_seqs=4, max_num_batched_tokens=16))
    for i in range(600):
        driver.submit(f"r{i}", array("i", [3 + (i * k) % 5 for k in range(1 + i % 20)]), max_tokens=1 + i % 9)
        if i % 3 == 0:
            driver.tick()
        if i % 10 < 3:
            driver.cancel(f"r{i - i % 7}")
    driver.run()
    assert len(driver.deltas) == 600
    assert all(story[-1].finish_reason for story in driver.deltas.values())
