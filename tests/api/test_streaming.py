from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.api.sse import json_line
from mixtral_serve.engine.errors import EngineUnavailable, QueueFull, RequestFailed
from mixtral_serve.engine.messages import Delta

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}


def test_a_stream_has_openais_form(api: Any) -> None:
    api.engine.answer = "hi"
    reply = api.chat(stream=True)
    *events, done = reply.events
    assert done == "[DONE]"
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in reply.headers
    constant = {
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "tiny",
        "system_fingerprint": "fp_test",
    }
    deltas = [{"role": "assistant", "content": ""}, {"content": "h"}, {"content": "i"}, {}]
    reasons = [None, None, None, "stop"]
    for event, delta, reason in zip(events, deltas, reasons, strict=True):
        assert event.pop("id").startswith("chatcmpl-")
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        assert event == constant | {"choices": [choice]}


def test_usage_comes_last_where_asked_and_every_other_chunk_has_it_null(api: Any) -> None:
    *events, usage, done = api.chat(stream=True, stream_options={"include_usage": True}).events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert all(event["usage"] is None for event in events)
    assert all("usage" not in event for event in api.chat(stream=True).events[:-1])


def test_each_choice_has_one_role_and_one_finish(api: Any) -> None:
    *events, done = api.chat(stream=True, n=3).events
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own].count("stop") == 1
        assert own[-1]["finish_reason"] == "stop"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "hello world"


def test_a_delta_that_shows_nothing_is_not_sent(api: Any) -> None:
    """Text that is held back for a stop string, or half a character."""
    api.engine.answer = None
    original = api.engine.submit

    def submit(requests: Any) -> Any:
        streams = original(requests)
        request_id = requests[0].request_id
        for text in ("", "ab", ""):
            api.engine.streams[request_id].push(Delta(request_id=request_id, text=text, token_ids=(5,)))
        api.engine.end(request_id, "stop", num_output_tokens=3)
        return streams

    api.engine.submit = submit
    deltas = [event["choices"][0]["delta"] for event in api.chat(stream=True).events[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "ab"}, {}]


EVIL = [
    "\n\ndata: [DONE]\n\n",
    "data: x",
    "\r\n",
    "\u2028\u2029\x85",
    "</script>",
    "\x7f\x1e\x0b",
    "😀",
    "[DONE]",
    '"\\',
]


@given(st.lists(st.sampled_from(EVIL) | st.text(st.characters(exclude_categories=["Cs"])), min_size=1).map("".join))
def test_row28_model_text_cannot_break_the_framing(text: str) -> None:
    line = json_line({"text": text})
    assert line.decode().splitlines() == [line.decode()]
    assert json.loads(line) == {"text": text}


def test_row28_a_client_reads_evil_text_back_exactly(api: Any) -> None:
    text = "".join(EVIL)
    api.engine.answer = text
    for event_list in (api.chat(stream=True).events, api.complete(stream=True).events):
        choices = [event["choices"][0] for event in event_list[:-1]]
        said = [choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices]
        assert "".join(said) == text
    assert api.chat().json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(5, 7.2), 429, "rate_limit_exceeded"),
        (EngineUnavailable("restarting", 3.0), 503, "server_is_overloaded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_a_true_status_also_for_streams(
    api: Any, error: Exception, status: int, code: str, stream: bool
) -> None:
    api.engine.refusal = error
    reply = api.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert int(reply.headers["retry-after"]) >= 3


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("error", 500, "generation_failed"), ("cancelled", 503, "interrupted"), ("deadline", 503, "interrupted")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_row36_a_failure_before_the_first_token_has_a_true_status(
    api: Any, reason: str, status: int, code: str, stream: bool, run: Any
) -> None:
    api.engine.answer = None

    async def scenario() -> Any:
        answering = asyncio.create_task(api.send("POST", CHAT, BODY | {"stream": stream}))
        await api.engine.on_submit.wait()
        api.engine.end(api.engine.last.request_id, reason, error="at 0x7f00deadbeef in /home/x")
        return await answering

    reply = run(scenario())
    assert (reply.status, reply.error["code"]) == (status, code)
    assert b"0x7f" not in reply.body
    assert b"/home" not in reply.body


@pytest.mark.parametrize("reason", ["error", "cancelled", "deadline"])
@pytest.mark.parametrize("n", [1, 3])
def test_row36_a_failure_in_mid_stream_is_an_error_event_and_no_done(api: Any, reason: str, n: int, run: Any) -> None:
    api.engine.answer = None

    async def scenario() -> Any:
        answering = asyncio.create_task(api.send("POST", CHAT, BODY | {"n": n}))
        await api.engine.on_submit.wait()
        first, *others = [submit.request_id for submit in api.engine.submits]
        api.engine.say(first, "he", reason=None)
        api.engine.end(first, reason)
        reply = await answering
        assert sorted(api.engine.cancelled) == sorted(others), "the siblings are ended, the failed one has ended"
        return reply

    reply = run(scenario())
    assert reply.status == 200
    events = reply.events
    assert "[DONE]" not in events
    assert events[-1]["error"]["code"] in ("generation_failed", "interrupted")
    assert all("error" not in event for event in events[:-1])
    said = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(said) == "he"


def test_a_retryable_failure_says_so(api: Any) -> None:
    error = RequestFailed("the engine stopped while it worked on the request", is_retryable=True)
    api.engine.refusal = error
    reply = api.chat()
    assert (reply.status, reply.error["code"]) == (503, "interrupted")
    assert "retry-after" in reply.headers
