"""Streams that wait long: comments keep them alive, and progress is told to those who ask for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.api.app import create_app
from mixtral_serve.api.deps import ApiSettings
from mixtral_serve.api.sse import COMMENT, EventStream, KeepAlive
from mixtral_serve.engine.messages import Delta

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}


class Pauses:
    """Stands in for time: each pause ends when the test says so."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self._waiting: list[asyncio.Future[None]] = []

    async def __call__(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def end(self) -> None:
        """End the pause, and let what follows from it happen."""
        while not self._waiting:
            await asyncio.sleep(0)
        self._waiting.pop().set_result(None)
        for _ in range(5):
            await asyncio.sleep(0)


def watched(api: Any, pauses: Pauses, **settings: Any) -> Any:
    deps = replace(api.deps, pause=pauses, settings=ApiSettings(**settings))
    return create_app(deps)


def bodies(call: Any) -> list[bytes]:
    return [message["body"] for message in call.sent if message["type"] == "http.response.body"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_silent_stream_is_kept_alive_by_comments(api: Any, run: Any, start_exchange: Any, path: str) -> None:
    api.engine.answer = None
    pauses = Pauses()

    async def scenario() -> None:
        body = BODY if path == CHAT else {"model": "tiny", "prompt": "hello", "stream": True}
        call = start_exchange(watched(api, pauses, sse_keep_alive_s=8.0), "POST", path, json.dumps(body).encode())
        task = call.start()
        await api.engine.on_submit.wait()
        await pauses.end()
        assert pauses.asked_s[0] == 4.0
        assert (call.sent[0]["status"], bodies(call)) == (200, [COMMENT]), "a long prompt begins the answer"
        await pauses.end()
        assert bodies(call) == [COMMENT, COMMENT]
        api.engine.say(api.engine.last.request_id, "a", reason=None)
        for _ in range(5):
            await asyncio.sleep(0)
        num_sent = len(bodies(call))
        await pauses.end()
        assert len(bodies(call)) == num_sent, "somebody spoke since the last look"
        await pauses.end()
        assert bodies(call)[num_sent:] == [COMMENT]
        api.engine.say(api.engine.last.request_id, "b")
        await task
        assert bodies(call)[-2:] == [b"data: [DONE]\n\n", b""]

    run(scenario())


@pytest.mark.parametrize(("silent", "status"), [(True, 200), (False, 500)])
def test_an_error_after_a_comment_is_an_event_and_before_it_a_status(
    api: Any, run: Any, start_exchange: Any, silent: bool, status: int
) -> None:
    api.engine.answer = None
    pauses = Pauses()

    async def scenario() -> None:
        call = start_exchange(watched(api, pauses), "POST", CHAT, json.dumps(BODY).encode())
        task = call.start()
        await api.engine.on_submit.wait()
        if silent:
            await pauses.end()
        api.engine.end(api.engine.last.request_id, "error")
        await task
        assert call.sent[0]["status"] == status
        body = b"".join(bodies(call)).decode()
        if silent:
            comment, event, _ = body.split("\n\n")
            assert comment == ": keep-alive"
            body = event.removeprefix("data: ")
        assert json.loads(body)["error"]["code"] == "generation_failed"

    run(scenario())


def test_zero_switches_comments_off(api: Any, run: Any, start_exchange: Any) -> None:
    pauses = Pauses()

    async def scenario() -> None:
        call = start_exchange(watched(api, pauses, sse_keep_alive_s=0.0), "POST", CHAT, json.dumps(BODY).encode())
        await call.start()
        assert pauses.asked_s == []

    run(scenario())


def test_a_comment_that_waits_for_a_slow_reader_neither_breaks_nor_outlives_the_stream(run: Any) -> None:
    """The comment's task is cancelled while it sends the head: the head still goes out, once, and first."""

    async def scenario() -> None:
        sent: list[dict[str, Any]] = []
        gate = asyncio.Event()
        begun = asyncio.Event()

        async def send(message: Any) -> None:
            begun.set()
            await gate.wait()
            sent.append(message)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def events() -> AsyncGenerator[bytes, None]:
            await begun.wait()
            asyncio.get_running_loop().call_soon(gate.set)
            yield b"data: x\n\n"

        pauses = Pauses()
        stream = EventStream(events(), on_close=_nothing, headers={}, keep_alive=KeepAlive(2.0, pauses))
        task = asyncio.create_task(stream({}, receive, send))
        await pauses.end()
        await task
        assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (
            len(sent) - 1
        )
        assert b"".join(message.get("body", b"") for message in sent).replace(COMMENT, b"") == b"data: x\n\n"

    run(scenario())


def test_leaving_during_a_silence_cancels_the_request(api: Any, run: Any, start_exchange: Any) -> None:
    api.engine.answer = None
    pauses = Pauses()

    async def scenario() -> None:
        call = start_exchange(watched(api, pauses), "POST", CHAT, json.dumps(BODY).encode())
        task = call.start()
        await api.engine.on_submit.wait()
        await pauses.end()
        call.left.set()
        await task
        assert api.engine.cancelled == [api.engine.last.request_id]

    run(scenario())


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_progress_is_told_in_chunks_without_text_to_those_who_ask(api: Any, run: Any, path: str) -> None:
    api.engine.answer = None
    times = iter([10.0, 10.0, 10.5, 10.75])
    deps = replace(api.deps, clock=lambda: next(times, 11.0))
    api = type(api)(create_app(deps), api.engine, deps)

    async def scenario() -> None:
        prompt = BODY if path == CHAT else {"model": "tiny", "prompt": [[5, 6, 7], [5] * 9], "stream": True}
        asked = asyncio.create_task(api.send("POST", path, prompt | {"n": 2, "return_progress": True}))
        await api.engine.on_submit.wait()
        submits = api.engine.submits
        assert all(submit.report_progress for submit in submits)
        last = submits[-1].request_id
        for done in (4, 8):
            delta = Delta(request_id=last, num_prompt_tokens_done=done, num_cached_tokens=2)
            api.engine.streams[last].push(delta)
        for submit in submits:
            api.engine.say(submit.request_id, "a")
        events = (await asked).events[:-1]
        told = [event for event in events if "prompt_progress" in event]
        num_tokens = len(submits[-1].prompt) // 4
        assert [event["prompt_progress"] for event in told] == [
            {"total": num_tokens, "cache": 2, "processed": 4, "time_ms": 500},
            {"total": num_tokens, "cache": 2, "processed": 8, "time_ms": 750},
        ]
        for event in told:
            (choice,) = event["choices"]
            assert choice["index"] == len(submits) - 1
            assert choice.get("text", "") == ""
            assert choice.get("delta", {}) == {}
            assert choice["finish_reason"] is None

    run(scenario())


def test_progress_of_a_whole_answer_is_refused(api: Any) -> None:
    assert api.chat(return_progress=True).error["param"] == "return_progress"


def _nothing() -> None:
    """There is nothing to close."""
