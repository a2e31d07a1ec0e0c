"""A token stream never blocks its writer, ends once, and tells its reader the truth."""

from __future__ import annotations

import asyncio

import pytest

from mixtral_serve.engine.errors import RequestCancelled, RequestFailed
from mixtral_serve.engine.messages import Delta
from mixtral_serve.engine.stream import TokenStream


class Owner:
    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.stream = TokenStream("a", self.cancelled.append, lambda delta: RequestFailed(delta.error or ""))

    def say(self, text: str, finish_reason: str | None = None, error: str | None = None) -> None:
        self.stream.push(Delta(request_id="a", text=text, finish_reason=finish_reason, error=error))


def test_deltas_come_out_in_order_and_end_after_the_last(run):
    async def story() -> None:
        owner = Owner()
        for text in "abc":
            owner.say(text)
        owner.say("d", "stop")
        assert owner.stream.num_queued == 4
        assert [delta.text async for delta in owner.stream] == ["a", "b", "c", "d"]
        assert [delta async for delta in owner.stream] == []

    run(story())


def test_a_reader_that_waits_is_woken(run):
    async def story() -> None:
        owner = Owner()
        reader = asyncio.create_task(anext(owner.stream))
        await asyncio.sleep(0)
        owner.say("x")
        assert (await reader).text == "x"

    run(story())


def test_a_reader_that_left_while_waiting_does_not_break_the_writer(run):
    async def story() -> None:
        owner = Owner()
        reader = asyncio.create_task(anext(owner.stream))
        await asyncio.sleep(0)
        reader.cancel()
        owner.say("x")
        with pytest.raises(asyncio.CancelledError):
            await reader
        owner.say("y")
        assert [(await anext(owner.stream)).text for _ in range(2)] == ["x", "y"]

    run(story())


def test_an_error_is_raised_after_what_came_before_it(run):
    async def story() -> None:
        owner = Owner()
        owner.say("a")
        owner.say("", "error", "it broke")
        assert (await anext(owner.stream)).text == "a"
        with pytest.raises(RequestFailed, match="it broke"):
            await anext(owner.stream)
        with pytest.raises(StopAsyncIteration):
            await anext(owner.stream)

    run(story())


def test_row33_cancel_is_sent_once_and_not_after_the_end(run):
    async def story() -> None:
        owner = Owner()
        async with owner.stream as stream:
            stream.cancel()
            stream.cancel()
        assert owner.cancelled == ["a"]
        ended = Owner()
        async with ended.stream:
            ended.say("x", "length")
        assert ended.cancelled == []

    run(story())


def test_row35_a_stalled_reader_blocks_nobody_and_loses_nothing(run):
    async def story() -> None:
        owner = Owner()
        for _ in range(10_000):
            owner.say("x")
        owner.say("", "length")
        assert owner.stream.num_queued == 10_001
        assert "".join([delta.text async for delta in owner.stream]) == "x" * 10_000

    run(story())


def test_who_reads_a_revoked_stream_is_told_so_and_revoking_an_ended_one_does_nothing(run):
    async def story() -> None:
        owner = Owner()
        owner.say("a")
        assert owner.stream.is_open
        assert owner.stream.revoke()
        assert owner.cancelled == ["a"]
        assert (await anext(owner.stream)).text == "a"
        owner.say("", "cancelled")
        assert not owner.stream.is_open
        assert not owner.stream.revoke(), "a second time, before its reader came to hear of the first"
        with pytest.raises(RequestCancelled):
            await anext(owner.stream)
        assert not owner.stream.revoke()

        too_late = Owner()
        too_late.stream.revoke()
        too_late.say("b", "stop")
        assert [delta.text async for delta in too_late.stream] == ["b"], "it had ended by itself"

    run(story())
