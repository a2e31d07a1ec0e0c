"""Constrained requests in the engine: compiled off the ticks, masked beside them, ended by their grammars."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.fakes import FakeRunner, FakeScript, Fault, byte_ids, fake_parts
from mixtral_serve.engine.grammars import POLL_S
from mixtral_serve.engine.messages import Shutdown
from mixtral_serve.text.grammar import choice_grammar, json_schema_grammar, regex_grammar, user_grammar
from mixtral_serve.text.grammar_vocabulary import MATCHER_BYTES
from scheduler.plan import StepResult

SMALL = FakeScript(num_blocks=24, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
YES_OR_NO = choice_grammar(["yes", "no"], after_space=False)
RECORD = json_schema_grammar(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    after_space=False,
)


class AtOnce(Executor):
    """Runs what it is given on the spot."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future


class OnDemand(Executor):
    """Runs what it was given when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except Exception as error:  # noqa: BLE001 - as an executor does
                    future.set_exception(error)

        self.waiting.append(run)
        return future

    def run_next(self) -> None:
        self.waiting.pop(0)()


@pytest.fixture
def compiled(new_driver) -> Callable[..., Any]:
    """A driver whose grammars are compiled at once, or by the executor that is given."""

    def make(script: FakeScript = SMALL, compiler: Executor | None = None, runner: Any = None) -> Any:
        driver = new_driver(script, runner=runner)
        driver.core = EngineCore(
            driver.scheduler,
            driver.runner,
            fake_parts(script).token_bytes,
            clock=lambda: driver.now,
            max_failed_steps=3,
            compiler=compiler or AtOnce(),
        )
        return driver

    return make


def test_a_constrained_answer_matches_its_grammar_and_ends_with_stop_without_an_end_token(compiled) -> None:
    driver = compiled()
    for index in range(12):
        driver.submit(f"r{index}", grammar=RECORD, max_tokens=60, sampling=SamplingParams(seed=index))
    driver.submit("choice", grammar=YES_OR_NO)
    driver.run()
    texts = {driver.text(f"r{index}") for index in range(12)}
    assert len(texts) > 6
    for text in texts:
        value = json.loads(text)
        assert 0 <= value["a"] <= 999
        assert value["b"] in ("x", "yy")
    assert {driver.end(f"r{index}") for index in range(12)} == {"stop"}
    assert driver.text("choice") in ("yes", "no")
    assert driver.last("choice").num_output_tokens == len(driver.text("choice"))


def test_masks_survive_preemption_and_recomputing_and_touch_no_neighbour(compiled, new_driver) -> None:
    prompts = {f"r{i}": "the same beginning, then "[: 8 + i] * 2 + str(i) for i in range(12)}
    grammar = regex_grammar("[a-f]{30,60}", after_space=False)
    alone = {}
    for name, prompt in prompts.items():
        driver = compiled()
        driver.submit(name, prompt, max_tokens=20, grammar=grammar if int(name[1:]) % 2 else None)
        driver.run()
        alone[name] = driver.tokens(name)
    driver = compiled()
    for name, prompt in prompts.items():
        driver.submit(name, prompt, max_tokens=20, grammar=grammar if int(name[1:]) % 2 else None)
        driver.tick()
    driver.run()
    assert driver.last_tick.stats.num_preemptions > 0
    assert {name: driver.tokens(name) for name in prompts} == alone
    free = new_driver(SMALL)
    for name, prompt in prompts.items():
        if not int(name[1:]) % 2:
            free.submit(name, prompt, max_tokens=20)
    free.run()
    assert all(driver.tokens(name) == free.tokens(name) for name in free.deltas)


def test_the_choices_of_one_call_share_a_compiled_grammar_and_go_their_own_ways(compiled) -> None:
    driver = compiled()
    for choice in range(6):
        driver.submit(f"c{choice}", grammar=RECORD, max_tokens=60, sampling=SamplingParams(seed=7, choice=choice))
    driver.run()
    assert len({driver.text(f"c{choice}") for choice in range(6)}) > 1
    assert all(json.loads(driver.text(f"c{choice}")) for choice in range(6))


def test_no_step_waits_for_a_grammar_and_a_request_starts_when_its_own_is_ready(compiled) -> None:
    compiler = OnDemand()
    driver = compiled(compiler=compiler)
    driver.submit("slow", grammar=YES_OR_NO)
    assert driver.tick() is None
    assert driver.core.wait_s == POLL_S
    driver.submit("free", max_tokens=4)
    driver.tick()
    assert driver.last_tick.stats.num_waiting == 1
    assert driver.tokens("free")
    assert "slow" not in driver.deltas
    compiler.run_next()
    assert driver.core.wait_s == 0.0
    driver.run()
    assert driver.text("slow") in ("yes", "no")
    assert driver.end("free") == "length"


@pytest.mark.parametrize("is_started", [False, True])
def test_a_request_that_waits_for_its_grammar_can_be_cancelled(compiled, is_started) -> None:
    compiler = OnDemand()
    driver = compiled(compiler=compiler)
    driver.submit("a", grammar=YES_OR_NO)
    if is_started:
        compiler.run_next()
    driver.cancel("a", "a")
    driver.tick()
    assert driver.end("a") == "cancelled"
    if not is_started:
        compiler.run_next()
    driver.assert_quiet()
    assert driver.core.wait_s is None


def test_a_deadline_strikes_while_its_request_waits_for_its_grammar(compiled) -> None:
    compiler = OnDemand()
    driver = compiled(compiler=compiler)
    driver.submit("late", grammar=YES_OR_NO, deadline_s=5.0)
    driver.submit("patient", grammar=YES_OR_NO)
    driver.now = 4.9
    assert driver.tick() is None
    driver.now = 5.0
    driver.tick()
    assert driver.end("late") == "deadline"
    assert driver.last_tick.stats.num_waiting == 1
    compiler.run_next()
    compiler.run_next()
    driver.run()
    assert driver.text("patient") in ("yes", "no")


def test_an_id_that_runs_is_not_compiled_for_again_and_can_still_be_cancelled(compiled) -> None:
    compiler = OnDemand()
    driver = compiled(compiler=compiler)
    driver.submit("a", max_tokens=60)
    driver.tick()
    driver.submit("a", grammar=YES_OR_NO)
    assert not compiler.waiting
    driver.cancel("a")
    ends = [(delta.finish_reason, delta.refusal) for delta in driver.core.tick().deltas]
    assert ends == [("error", "DuplicateRequestError"), ("cancelled", None)]


def test_closing_leaves_no_thread_behind_and_begins_no_further_grammar(new_driver) -> None:
    before = set(threading.enumerate())
    driver = new_driver(SMALL)
    driver.submit("a", grammar=RECORD, max_tokens=60)
    while "a" not in driver.deltas or driver.deltas["a"][-1].finish_reason is None:
        driver.tick()
    started = set(threading.enumerate()) - before
    assert started
    driver.core.close()
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)


def test_a_shutdown_ends_what_waits_for_its_grammar(compiled) -> None:
    driver = compiled(compiler=OnDemand())
    driver.submit("a", grammar=YES_OR_NO)
    driver.core.handle([Shutdown()])
    driver.tick()
    assert driver.end("a") == "cancelled"


def test_an_id_that_waits_for_its_grammar_is_taken(compiled) -> None:
    compiler = OnDemand()
    driver = compiled(compiler=compiler)
    driver.submit("a", grammar=YES_OR_NO)
    driver.core.handle([])
    driver.deltas["a"] = []
    driver.submit("a", grammar=RECORD)
    driver.tick()
    assert driver.deltas.pop("a")[-1].refusal == "DuplicateRequestError"
    compiler.run_next()
    driver.run()
    assert driver.text("a") in ("yes", "no")


def test_an_id_that_runs_keeps_its_own_grammar(compiled) -> None:
    driver = compiled()
    driver.submit("a", grammar=regex_grammar("[xy]{12}", after_space=False))
    driver.tick()
    first = driver.deltas.pop("a")
    driver.submit("a", grammar=YES_OR_NO)
    driver.core.tick()
    driver.run()
    assert set("".join(d.text for d in first) + driver.text("a")) <= set("xy")


@pytest.mark.parametrize("grammar", ["nonsense", user_grammar("start: missing", after_space=False)])
def test_a_grammar_that_cannot_be_compiled_ends_its_own_request(compiled, grammar) -> None:
    driver = compiled()
    driver.submit("bad", grammar=grammar)
    driver.submit("good", grammar=YES_OR_NO)
    driver.run()
    assert driver.end("bad") == "error"
    assert "grammar" in driver.last("bad").error
    assert driver.end("good") == "stop"


def test_a_grammar_that_gives_up_on_its_way_ends_its_own_request(compiled) -> None:
    rules = [f"a{i}: a{i + 1} a{i + 1}" for i in range(40)]
    ambiguous = user_grammar('start: "q" a0 "!"\n' + "\n".join(rules) + '\na40: "x" | ', after_space=False)
    driver = compiled(FakeScript(output="q" + "x" * 50 + "!"))
    driver.submit("bad", grammar=ambiguous, max_tokens=60)
    driver.submit("good", grammar=YES_OR_NO)
    driver.run()
    assert driver.end("bad") == "error"
    assert "too complex" in driver.last("bad").error
    assert driver.end("good") == "stop"


class Stubborn(FakeRunner):
    """A runner that looks at no mask."""

    def run(self, batch: RunBatch) -> StepResult:
        return super().run(RunBatch(batch.plan, batch.sampling))


def test_a_token_that_does_not_fit_the_grammar_ends_the_request_with_an_error(compiled) -> None:
    script = FakeScript(output="maybe")
    driver = compiled(script, runner=Stubborn(script))
    driver.submit("a", grammar=YES_OR_NO)
    driver.submit("b")
    driver.run()
    assert driver.end("a") == "error"
    assert (driver.text("b"), driver.end("b")) == ("maybe", "stop")


def test_a_failed_step_leaves_the_grammars_of_others_in_order(compiled) -> None:
    script = FakeScript(faults={2: Fault.RAISE}, max_num_seqs=1)
    driver = compiled(script)
    driver.submit("a", grammar=RECORD, max_tokens=60)
    driver.submit("b", grammar=YES_OR_NO)
    driver.run()
    assert (driver.end("a"), driver.end("b")) == ("error", "stop")
    assert driver.text("b") in ("yes", "no")


def test_a_grammar_ends_a_request_whatever_min_tokens_and_ignore_eos_say(compiled) -> None:
    driver = compiled()
    driver.submit("min", grammar=YES_OR_NO, min_tokens=10, max_tokens=12)
    driver.submit("eos", grammar=YES_OR_NO, ignore_eos=True)
    driver.submit("open", grammar=regex_grammar("a+", after_space=False), ignore_eos=True, max_tokens=60)
    driver.run()
    assert {driver.end("min"), driver.end("eos"), driver.end("open")} == {"stop"}
    assert driver.text("min") in ("yes", "no")
    assert set(driver.text("open")) == {"a"}


def test_a_grammar_that_accepts_nothing_lets_the_answer_end_at_once(compiled) -> None:
    driver = compiled(FakeScript(output=""))  # wants to end at once
    driver.submit("b", grammar=regex_grammar("a*", after_space=False))
    driver.run()
    assert (driver.text("b"), driver.end("b")) == ("", "stop")


def test_max_tokens_and_stop_strings_end_a_request_before_its_grammar_is_satisfied(compiled) -> None:
    driver = compiled()
    digits = regex_grammar("[0-9]{50}", after_space=False)
    driver.submit("cut", grammar=digits, max_tokens=5)
    driver.submit("stopped", grammar=regex_grammar("ab{40}", after_space=False), stop=("bb",), max_tokens=60)
    driver.submit("token", grammar=regex_grammar("ab{40}", after_space=False), stop_token_ids=byte_ids("b"))
    driver.run()
    assert (len(driver.text("cut")), driver.end("cut")) == (5, "length")
    assert (driver.text("stopped"), driver.end("stopped")) == ("a", "stop")
    assert (driver.text("token"), driver.end("token")) == ("a", "stop")


def test_a_constrained_request_is_charged_for_its_matcher(compiled) -> None:
    driver = compiled(FakeScript(requests_budget_bytes=MATCHER_BYTES * 2))
    for name in ("a", "b", "free"):
        driver.submit(name, grammar=None if name == "free" else YES_OR_NO)
    driver.run()
    assert driver.end("a") == "stop"
    assert driver.last("b").refusal == "MemoryFullError"
    assert driver.last("free").refusal is None


def test_threads_of_its_own_compile_and_mask_where_nobody_brings_any(new_driver) -> None:
    driver = new_driver(SMALL)
    driver.submit("a", grammar=RECORD, max_tokens=60)
    while "a" not in driver.deltas or driver.deltas["a"][-1].finish_reason is None:
        driver.tick()
    assert json.loads(driver.text("a"))
