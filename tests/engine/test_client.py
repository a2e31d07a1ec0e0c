"""The client with a real (fake-model) engine process: streams, refusals, deaths, restarts, shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest

from mixtral_serve.engine.errors import (
    EngineStartError,
    EngineUnavailable,
    PromptTooLong,
    QueueFull,
    RequestFailed,
    RequestRefused,
    TokenOutOfRange,
)
from mixtral_serve.engine.fakes import FakeScript, Fault, byte_ids
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.engine.watchdog import Health, Watchdog

ENDLESS = FakeScript(never_ends=True, step_s=0.01, num_blocks=4096)
POISON = byte_ids("!")[0]


async def text_of(stream: TokenStream) -> str:
    return "".join([delta.text async for delta in stream])


async def first_of(stream: TokenStream) -> Delta:
    return await anext(stream)


class Sleeper:
    """Stands in for the pause between restarts: notes what it was asked, and lets the test say when it is over."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self.go = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        await self.go.wait()


def test_requests_stream_to_their_ends_and_listeners_see_everything(run, new_client, submit_of, recorder):
    async def story() -> None:
        async with new_client(FakeScript(output="Grüße 🙂"), listeners=[recorder]) as client:
            assert client.state is EngineState.LOADING
            info = await client.wait_ready()
            assert client.info == info
            assert client.is_ready
            streams = client.submit([submit_of(f"r{i}", max_tokens=50) for i in range(20)])
            assert client.num_live == 20
            assert await asyncio.gather(*map(text_of, streams)) == ["Grüße 🙂"] * 20
            assert client.num_live == 0
            assert client.stats.num_generation_tokens == 20 * (len("Grüße 🙂".encode()) + 1)
        assert recorder.submits == [f"r{i}" for i in range(20)]
        assert all(recorder.ends(f"r{i}") == ["stop"] for i in range(20))
        assert recorder.states == [EngineState.READY, EngineState.DRAINING, EngineState.DEAD]

    run(story())


def test_row29_row30_row31_leaving_a_stream_cancels_the_request(run, new_client, submit_of, until, recorder):
    async def story() -> None:
        async with new_client(ENDLESS, listeners=[recorder]) as client:
            await client.wait_ready()
            (decoding, unread) = client.submit([submit_of("a", max_tokens=4000), submit_of("b", max_tokens=4000)])
            async with decoding, unread:
                await first_of(decoding)
            await until(lambda: client.num_live == 0)
            assert recorder.ends("a") == recorder.ends("b") == ["cancelled"]
            assert client.stats.num_used_blocks == 0
            assert client.stats.num_running == 0

    run(story())


def test_nothing_is_accepted_before_the_engine_is_ready_and_the_refusal_says_so(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(FakeScript(load_s=30.0)) as client:
            with pytest.raises(EngineUnavailable, match="loading") as caught:
                client.submit([submit_of("a")])
            assert caught.value.reason == "loading"
            assert caught.value.retry_after_s > 0
            waiting = asyncio.create_task(client.wait_ready())
            await asyncio.sleep(0)
            started_s = time.monotonic()
            await client.stop(10.0)
            assert time.monotonic() - started_s < 5.0, "an engine that loads has nothing to drain"
            with pytest.raises(EngineUnavailable):
                await waiting

    run(story())


def test_refusals_are_typed_synchronous_and_leave_no_trace(run, new_client, submit_of):
    async def story() -> None:
        script = FakeScript(num_blocks=5, block_size=4, never_ends=True, max_num_seqs=4, step_s=0.01)
        async with new_client(script, max_waiting=2, max_num_seqs=4) as client:
            await client.wait_ready()
            with pytest.raises(PromptTooLong):
                client.submit([submit_of("a", [3] * 16, max_tokens=1)])
            with pytest.raises(TokenOutOfRange):
                client.submit([submit_of("a", [3], max_tokens=1), submit_of("b", [259], max_tokens=1)])
            with pytest.raises(QueueFull) as caught:
                client.submit([submit_of(f"r{i}", max_tokens=9) for i in range(7)])
            assert caught.value.retry_after_s >= 1.0
            assert client.num_live == 0
            streams = client.submit([submit_of(f"r{i}", max_tokens=9) for i in range(6)])
            with pytest.raises(QueueFull):
                client.submit([submit_of("late", max_tokens=9)])
            for stream in streams:
                await text_of(stream)
            (canary,) = client.submit([submit_of("canary", max_tokens=2)])
            await text_of(canary)

    run(story())


def test_what_only_the_engine_refuses_arrives_as_a_refusal(run, new_client, submit_of):
    async def story() -> None:
        script = FakeScript(max_waiting=1, max_num_seqs=1, never_ends=True)
        async with new_client(script, max_waiting=10) as client:
            await client.wait_ready()
            (bad,) = client.submit([submit_of("bad", min_tokens=99)])
            with pytest.raises(RequestRefused, match="min_tokens"):
                await text_of(bad)
            streams = client.submit([submit_of(f"r{i}") for i in range(3)])
            outcomes = await asyncio.gather(*map(text_of, streams), return_exceptions=True)
            assert isinstance(outcomes[2], QueueFull)
            assert outcomes[2].retry_after_s > 0

    run(story())


def test_a_request_whose_structures_find_no_memory_is_told_to_come_again_later(run, new_client, submit_of):
    async def story() -> None:
        script = FakeScript(requests_budget_bytes=30_000, output="ok")
        async with new_client(script, max_waiting=10) as client:
            await client.wait_ready()
            (large,) = client.submit([submit_of("large", max_tokens=500)])
            with pytest.raises(QueueFull) as caught:
                await text_of(large)
            assert caught.value.retry_after_s > 0
            (canary,) = client.submit([submit_of("canary", max_tokens=5)])
            assert await text_of(canary) == "ok"

    run(story())


def test_row36_a_failed_step_fails_its_streams_and_the_next_request_works(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(FakeScript(output="ok", poison={POISON: Fault.RAISE})) as client:
            await client.wait_ready()
            (bad,) = client.submit([submit_of("bad", "!")])
            with pytest.raises(RequestFailed) as caught:
                await text_of(bad)
            assert not caught.value.is_retryable
            assert "RuntimeError" in caught.value.detail
            assert "RuntimeError" not in str(caught.value)
            (canary,) = client.submit([submit_of("canary")])
            assert await text_of(canary) == "ok"
            assert client.state is EngineState.READY

    run(story())


def test_row37_row52_a_killed_engine_ends_every_stream_and_comes_back(run, new_client, submit_of, until, recorder):
    async def story() -> None:
        sleeper = Sleeper()
        async with new_client(ENDLESS, listeners=[recorder], sleep=sleeper) as client:
            await client.wait_ready()
            streams = client.submit([submit_of(f"r{i}", max_tokens=4000) for i in range(8)])
            await asyncio.gather(*map(first_of, streams))
            os.kill(client.engine_pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(RequestFailed) as caught:
                    await text_of(stream)
                assert caught.value.is_retryable
            assert all(recorder.ends(f"r{i}") == ["error"] for i in range(8))
            await until(lambda: client.state is EngineState.RESTARTING)
            assert not client.is_ready
            assert client.num_live == 0
            with pytest.raises(EngineUnavailable, match="restarting") as refusal:
                client.submit([submit_of("early")])
            assert 0 < refusal.value.retry_after_s < 10
            await until(lambda: sleeper.asked_s == [0.5])
            sleeper.go.set()
            await client.wait_ready()
            assert client.is_ready
            (canary,) = client.submit([submit_of("canary", max_tokens=3)])
            await text_of(canary)
            assert recorder.states[:3] == [EngineState.READY, EngineState.RESTARTING, EngineState.READY]

    run(story())


def test_row37_a_crash_loop_backs_off_and_never_gives_up(run, new_client, until):
    async def story() -> None:
        sleeper = Sleeper()
        sleeper.go.set()
        async with new_client(FakeScript(load_crash=True), sleep=sleeper) as client:
            await until(lambda: len(sleeper.asked_s) >= 3)
            assert sleeper.asked_s[:3] == [0.5, 1.0, 2.0]
            assert client.state is EngineState.RESTARTING

    run(story())


def test_row37_an_engine_that_speaks_gibberish_is_replaced(run, new_client, until):
    async def story() -> None:
        sleeper = Sleeper()
        program = "import os, sys; os.write(int(sys.argv[-1]), b'\\xff' * 64); os.read(int(sys.argv[-1]), 1)"
        async with new_client(EngineLaunch((sys.executable, "-c", program)), sleep=sleeper) as client:
            await until(lambda: client.state is EngineState.RESTARTING)

    run(story())


def test_row37_an_engine_that_dies_while_draining_ends_the_drain(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(ENDLESS) as client:
            await client.wait_ready()
            (stream,) = client.submit([submit_of("a", max_tokens=4000)])
            await first_of(stream)
            stopping = asyncio.create_task(client.stop(3600.0))
            os.kill(client.engine_pid, signal.SIGKILL)
            with pytest.raises(RequestFailed):
                await text_of(stream)
            await stopping
            assert client.state is EngineState.DEAD

    run(story())


def test_a_stop_right_after_the_start_leaves_no_process_behind(run, new_client):
    async def story() -> None:
        async with new_client(FakeScript(load_s=30.0)) as client:
            await client.stop(0.0)
            assert client.state is EngineState.DEAD
            assert client.engine_pid is None

    run(story())


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (FakeScript(load_error="config.json is missing"), "config.json is missing"),
        (EngineLaunch(("/nonexistent/engine",)), "cannot be launched"),
    ],
)
def test_row54_an_engine_that_cannot_start_is_dead_and_not_tried_again(run, new_client, submit_of, launch, message):
    async def story() -> None:
        sleeper = Sleeper()
        async with new_client(launch, sleep=sleeper) as client:
            with pytest.raises(EngineStartError, match=message) as caught:
                await client.wait_ready()
            assert caught.value.exit_code == 78
            with pytest.raises(EngineStartError):
                await client.wait_ready()
            with pytest.raises(EngineUnavailable):
                client.submit([submit_of("a")])
            assert sleeper.asked_s == []

    run(story())


def test_row38_a_hanging_step_is_not_ready_then_killed_and_restarted(run, new_client, submit_of, until):
    async def story() -> None:
        dog = Watchdog(stalled_after_s=0.2, hopeless_after_s=0.6, period_s=0.05)
        script = FakeScript(output="ok", poison={POISON: Fault.HANG})
        async with new_client(script, watchdog=dog) as client:
            await client.wait_ready()
            (hung,) = client.submit([submit_of("hung", "!")])
            await until(lambda: client.health is Health.STALLED)
            assert client.state is EngineState.READY
            assert not client.is_ready
            with pytest.raises(RequestFailed):
                await text_of(hung)
            await client.wait_ready()
            await until(lambda: client.is_ready)
            (canary,) = client.submit([submit_of("canary")])
            assert await text_of(canary) == "ok"

    run(story())


def test_row58_stop_lets_streams_finish_and_refuses_new_ones(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(FakeScript(output="0123456789", step_s=0.01)) as client:
            await client.wait_ready()
            (stream,) = client.submit([submit_of("a", max_tokens=50)])
            stopping = asyncio.create_task(client.stop(30.0))
            await asyncio.sleep(0)
            assert client.state is EngineState.DRAINING
            with pytest.raises(EngineUnavailable, match="draining"):  # row 59
                client.submit([submit_of("b")])
            assert await text_of(stream) == "0123456789"
            await stopping
            assert client.state is EngineState.DEAD
            assert client.engine_pid is None

    run(story())


def test_row58_stop_ends_the_rest_with_an_error_when_time_is_up(run, new_client, submit_of, recorder):
    async def story() -> None:
        async with new_client(ENDLESS, listeners=[recorder]) as client:
            await client.wait_ready()
            streams = client.submit([submit_of(f"r{i}", max_tokens=4000) for i in range(5)])
            await asyncio.gather(*map(first_of, streams))
            await client.stop(0.2)
            for stream in streams:
                with pytest.raises(RequestFailed, match="shutting down"):
                    await text_of(stream)
            assert all(recorder.ends(f"r{i}") == ["error"] for i in range(5))

    run(story())


def test_row58_a_second_stop_without_patience_ends_the_drain_at_once(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(ENDLESS) as client:
            await client.wait_ready()
            client.submit([submit_of("a", max_tokens=4000)])
            patient = asyncio.create_task(client.stop(3600.0))
            await asyncio.sleep(0)
            assert client.state is EngineState.DRAINING
            await client.stop(0.0)
            await patient
            assert client.state is EngineState.DEAD

    run(story())


@pytest.mark.slow
def test_row58_an_engine_that_hangs_is_killed_on_the_way_out(run, new_client, submit_of, until):
    async def story() -> None:
        dog = Watchdog(stalled_after_s=0.2, period_s=0.05)
        async with new_client(FakeScript(poison={POISON: Fault.HANG}), watchdog=dog) as client:
            await client.wait_ready()
            (hung,) = client.submit([submit_of("hung", "!")])
            await until(lambda: client.health is Health.STALLED)
            await client.stop(0.0)
            with pytest.raises(RequestFailed, match="shutting down"):
                await text_of(hung)
            assert client.state is EngineState.DEAD

    run(story())


def test_row35_a_reader_that_never_reads_does_not_hold_up_the_others(run, new_client, submit_of):
    async def story() -> None:
        async with new_client(FakeScript(never_ends=True, num_blocks=4096)) as client:
            await client.wait_ready()
            stalled, lively = client.submit([submit_of("a", max_tokens=2000), submit_of("b", max_tokens=2000)])
            assert len([delta async for delta in lively]) == 2000
            assert stalled.num_queued == 2000, "bounded by max_tokens"
            assert client.num_live == 0, "its blocks are free although nobody read it"

    run(story())


class Saboteur:
    def on_submit(self, *_: object) -> None:
        raise RuntimeError("a listener is broken")

    on_tick = on_state = on_submit


def test_a_broken_listener_disturbs_neither_streams_nor_other_listeners(run, new_client, submit_of, recorder):
    async def story() -> None:
        async with new_client(FakeScript(output="ok"), listeners=[Saboteur(), recorder]) as client:
            await client.wait_ready()
            (stream,) = client.submit([submit_of("a")])
            assert await text_of(stream) == "ok"
            assert recorder.ends("a") == ["stop"]

    run(story())


def test_row60_a_stopped_and_continued_engine_goes_on_where_it_was(run, new_client, submit_of, until):
    async def story() -> None:
        dog = Watchdog(stalled_after_s=0.3, hopeless_after_s=60.0, period_s=0.05)
        async with new_client(ENDLESS, watchdog=dog) as client:
            await client.wait_ready()
            (stream,) = client.submit([submit_of("a", max_tokens=60)])
            await first_of(stream)
            os.kill(client.engine_pid, signal.SIGSTOP)
            await until(lambda: not client.is_ready)
            os.kill(client.engine_pid, signal.SIGCONT)
            await until(lambda: client.is_ready)
            assert len([delta async for delta in stream]) == 59

    run(story())
