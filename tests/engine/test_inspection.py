"""The table of requests: asked between two ticks, answered by the next, with waits that were measured or none."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, Future
from dataclasses import replace

import pytest

from mixtral_serve.engine.admission import FinishRate
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.errors import EngineUnavailable
from mixtral_serve.engine.fakes import FakeScript, Fault, fake_parts
from mixtral_serve.engine.inspection import MAX_ENTRIES, Inspections, TokenRate, estimated_wait_s
from mixtral_serve.engine.messages import (
    EngineStats,
    Inbox,
    Inspect,
    StepTiming,
    Tick,
    decode_inbox,
    decode_outbox,
    encode,
)
from mixtral_serve.text.grammar import choice_grammar
from scheduler.census import Blocking, Census, CensusEntry
from scheduler.lifecycle import RequestStatus
from scheduler.request import RequestId, RequestKind

WAITING = CensusEntry(
    id=RequestId("a"),
    status=RequestStatus.WAITING,
    kind=RequestKind.GENERATE,
    tenant="",
    priority=0,
    arrival_s=0.0,
    num_prompt_tokens=9,
    num_computed_tokens=0,
    num_output_tokens=0,
    max_tokens=5,
    num_preemptions=0,
    blocking=Blocking.SEATS,
    num_ahead=3,
    num_tokens_ahead=500,
)


def timing(num_tokens: int, total_s: float) -> StepTiming:
    return StepTiming(step_id=0, num_tokens=num_tokens, num_slices=1, schedule_s=0, run_s=total_s, total_s=total_s)


def tick(*censuses: Census, timed: StepTiming | None = None) -> Tick:
    return Tick(deltas=(), stats=EngineStats(), timing=timed, censuses=censuses)


@pytest.mark.parametrize(
    ("blocking", "wait_s"),
    [
        (None, 0.0),
        (Blocking.SEATS, 8.0),
        (Blocking.BLOCKS, 8.0),
        (Blocking.TOKEN_BUDGET, 5.0),
        (Blocking.NEXT_STEP, None),
        (Blocking.PREEMPTION, None),
        (Blocking.POLICY, None),
        (Blocking.PREFIX, None),
    ],
)
def test_a_wait_is_told_where_what_was_measured_tells_it(blocking: Blocking | None, wait_s: float | None) -> None:
    entry = replace(WAITING, blocking=blocking)
    assert estimated_wait_s(entry, seconds_per_end=2.0, tokens_per_s=100.0) == wait_s


@pytest.mark.parametrize("blocking", [Blocking.SEATS, Blocking.BLOCKS, Blocking.TOKEN_BUDGET])
def test_a_wait_that_nothing_measured_is_unknown(blocking: Blocking) -> None:
    entry = replace(WAITING, blocking=blocking)
    assert estimated_wait_s(entry, seconds_per_end=None, tokens_per_s=None) is None
    homeless = replace(entry, num_ahead=None, num_tokens_ahead=None)
    assert estimated_wait_s(homeless, seconds_per_end=2.0, tokens_per_s=100.0) is None


def test_the_token_rate_is_that_of_the_last_steps() -> None:
    rate = TokenRate()
    assert rate.tokens_per_s() is None
    rate.note_step(timing(0, 1.0))
    assert rate.tokens_per_s() is None
    rate.note_step(timing(100, 1.0))
    assert rate.tokens_per_s() == 50.0
    for _ in range(64):
        rate.note_step(timing(30, 0.1))
    assert rate.tokens_per_s() == pytest.approx(300.0)


def test_an_idle_engine_forgets_how_fast_it_was() -> None:
    rate = FinishRate()
    rate.note_finished(0.0, 2)
    assert rate.seconds_per_end(4.0) == 2.0
    rate.note_idle()
    assert rate.seconds_per_end(3600.0) is None


def test_who_asks_while_a_question_is_under_way_gets_its_answer(run):
    async def story() -> None:
        posted: list[Inspect] = []
        inspections = Inspections(posted.append, FinishRate())
        first, second, other = [asyncio.create_task(inspections.ask(tenant)) for tenant in ("a", "a", "b")]
        await asyncio.sleep(0)
        assert posted == [Inspect("a", MAX_ENTRIES), Inspect("b", MAX_ENTRIES)]
        first.cancel()
        census = Census("a", (WAITING, replace(WAITING, blocking=None)), 1, 1, 0)
        inspections.on_tick(tick(census, timed=timing(10, 1.0)), 0.0)
        table = await second
        assert table is not None
        assert (table.census, table.estimated_wait_s) == (census, (None, 0.0))
        inspections.end()
        assert await other is None
        inspections.on_tick(tick(census), 0.0)  # an answer that nobody waits for any more

    run(story())


def test_a_question_and_its_answer_survive_the_wire() -> None:
    inbox = Inbox((Inspect("a", 3),))
    assert decode_inbox(encode(inbox)) == inbox
    told = tick(Census("a", (WAITING,), 0, 1, 0))
    assert decode_outbox(encode(told)) == told


def test_the_core_answers_with_the_next_tick_and_only_once(new_driver):
    driver = new_driver(FakeScript(max_num_seqs=1))
    driver.submit("a", tenant="x")
    driver.submit("b", "He", tenant="x")
    driver.core.handle([Inspect("x", 10), Inspect("x", 5), Inspect("y", 5)])
    first = driver.tick()
    seen, other = first.censuses
    assert [(entry.id, entry.blocking) for entry in seen.entries] == [("a", None), ("b", Blocking.SEATS)]
    assert (other.tenant, other.entries) == ("y", ())
    assert driver.tick().censuses == ()
    driver.run()
    driver.core.handle([Inspect("x", 10)])
    idle = driver.tick()
    assert (idle.timing, idle.censuses) == (None, (Census("x", (), 0, 0, 0),))
    assert driver.tick() is None


def test_a_request_that_waits_for_its_grammar_is_in_the_table(new_driver):
    class Never(Executor):
        def submit(self, *_, **__):
            return Future()

    driver = new_driver()
    parts = fake_parts(FakeScript())
    driver.core = EngineCore(parts.scheduler, parts.runner, parts.token_bytes, compiler=Never())
    driver.submit("a", grammar=choice_grammar(["yes"], after_space=False), tenant="x")
    driver.core.handle([Inspect("x", 10)])
    (seen,) = driver.core.tick().censuses
    assert [(entry.id, entry.blocking) for entry in seen.entries] == [("a", Blocking.GRAMMAR)]
    assert seen.num_waiting == 1


async def _ask_for_ever(client) -> None:
    while True:
        await client.inspect("")


def test_the_client_tells_who_runs_and_who_waits(run, new_client, submit_of):
    async def story() -> None:
        script = FakeScript(never_ends=True, step_s=0.002, max_num_seqs=1, faults={150: Fault.EXIT})
        async with new_client(script, max_num_seqs=1) as client:
            with pytest.raises(EngineUnavailable):
                await client.inspect("")
            await client.wait_ready()
            client.submit([submit_of("a", max_tokens=2000), submit_of("b", "He", max_tokens=5)])
            table = await client.inspect("")
            while table.census.entries[-1].blocking is not Blocking.SEATS:
                table = await client.inspect("")
            assert [entry.id for entry in table.census.entries] == ["a", "b"]
            assert table.estimated_wait_s == (0.0, None), "nothing has ended yet"
            with pytest.raises(EngineUnavailable):
                await _ask_for_ever(client)  # it dies with the question

    run(story())
