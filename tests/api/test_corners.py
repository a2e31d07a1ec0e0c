"""Corners of the contract: requests that are odd but allowed, hostile but small, or in a form that few clients use."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.errors import ChatTemplateError
from mixtral_serve.text.fakes import write_tiny_tokenizer
from scheduler.events import TokenLogprob

WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
MANY = {f"k{index}": 1 for index in range(60_000)}
KNOWS_TOOLS = "{{ bos_token }}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[-1].content }}"


def respond(api: Any, **fields: Any) -> Any:
    return api.call("POST", "/v1/responses", {"model": "tiny", "input": "hello", **fields})


def events_of(reply: Any) -> list[Any]:
    return [json.loads(line[6:]) for line in reply.body.decode().splitlines() if line.startswith("data: {")]


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}}
    return value


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 1}, {"echo": True, "stream": True}])
def test_a_prompt_without_any_token_is_refused(api: Any, fields: dict[str, Any]) -> None:
    reply = api.complete(prompt=["hello", ""], add_special_tokens=False, **fields)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, "prompt", "empty_string")
    assert api.complete(prompt="", **fields).status == 200
    assert len(api.engine.submits) == 1


@pytest.mark.parametrize("arguments", ['{"x": "\\ud800"}', '{"x": NaN}', "[" * 900 + "]" * 900, "no JSON", ""])
def test_whatever_arguments_a_client_sends_back_are_shown_to_the_model(api: Any, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert api.call("POST", "/tokenize", {"messages": messages}).status == 200


def test_tools_that_no_template_can_walk_are_refused(api: Any, tmp_path: Any) -> None:
    write_tiny_tokenizer(tmp_path, chat_template=KNOWS_TOOLS)
    api = api.with_deps(chat_template=load_chat_template(tmp_path, api.deps.tokenizer))
    body = {"messages": [{"role": "user", "content": "x"}]}
    for levels, status in ((30, 200), (300, 400)):
        tool = {"type": "function", "function": {"name": "f", "parameters": nested(levels)}}
        reply = api.call("POST", "/tokenize", body | {"tools": [tool]})
        assert reply.status == status
    assert (reply.error["param"], reply.error["code"]) == ("tools", "invalid_value")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER | MANY]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f"} | MANY}]}, "tools[0].function"),
        ({"response_format": {"type": "json_schema", "json_schema": MANY}}, "response_format.json_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": MANY}}, "tool_choice.function"),
        ({"messages": [{"role": "assistant", "tool_calls": [MANY]}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_a_flood_of_fields_is_refused_before_each_is_described(api: Any, fields: dict[str, Any], param: str) -> None:
    for settings in ("error", "warn"):
        reply = api.with_settings(unknown_fields=settings).chat(**fields)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, "array_above_max_length")


def test_nulls_within_a_schema_are_its_own(api: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", None]}}, "required": ["a"], "default": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "description": None, "strict": None}}
    assert api.chat(tools=[tool]).status == 200
    assert '"default": null' in api.engine.last.grammar.replace('\\"', '"')


def test_a_large_body_is_not_walked_for_a_nul_that_it_does_not_have(api: Any) -> None:
    ids = b"[" + b"1," * 300_000 + b"1]"
    took_s = []
    for _ in range(3):  # a walk takes a second each time, a collection of garbage only happens to
        started_s = time.thread_time()
        reply = api.call("POST", "/detokenize", b'{"tokens": "\\\\u0000", "model": ' + ids + b"}")
        assert reply.error["param"] in ("tokens", "model")
        took_s.append(time.thread_time() - started_s)
    assert min(took_s) < 0.2
    reply = api.call("POST", "/detokenize", b'{"tokens": "\\\\\\u0000", "model": ' + ids + b"}")
    assert (reply.error["param"], reply.error["message"]) == (None, "The body must not contain the character NUL.")


def test_log_probabilities_that_name_the_token_nul_can_be_sent_back(api: Any) -> None:
    part = {"type": "output_text", "text": "x", "annotations": [], "logprobs": [{"token": "\0", "logprob": -1.0}]}
    item = {"type": "message", "role": "assistant", "content": [part]}
    assert respond(api, input=[item, {"role": "user", "content": "y"}]).status == 200
    assert respond(api, input=[item, {"role": "user", "content": "\0"}]).error["param"] == "input[1].content"


def test_unknown_fields_of_items_are_dropped_where_the_operator_allows_it(api: Any) -> None:
    lenient = api.with_settings(unknown_fields="warn")
    reply = respond(lenient, input=[{"role": "user", "content": "x", "mood": 1}])
    assert (reply.status, reply.headers["x-mixtral-serve-warning"]) == (200, "ignored: input[0].mood")
    assert respond(api, input=[{"role": "user", "content": "x", "mood": 1}]).error["param"] == "input[0].mood"


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
def test_what_is_dropped_of_a_conversation_is_named(api: Any, path: str) -> None:
    lenient = api.with_settings(unknown_fields="warn")
    body = {"messages": [{"role": "user", "content": "x", "name": "me", "mood": 1}], "foo": 1}
    reply = lenient.call("POST", path, body)
    assert reply.headers["x-mixtral-serve-warning"] == "ignored: foo, messages[0].name, messages[0].mood"


def test_what_a_response_repeats_can_be_sent_again(api: Any) -> None:
    answer = respond(api).json()
    fields = {
        name: answer[name] for name in ("reasoning", "top_logprobs", "text", "truncation", "store", "tool_choice")
    }
    assert respond(api, **fields).status == 200
    assert respond(api, reasoning={"effort": "high", "summary": None}).error["param"] == "reasoning"


def test_counts_in_every_chunk_need_counts_at_all(api: Any) -> None:
    reply = api.chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert (reply.status, reply.error["param"]) == (400, "stream_options.continuous_usage_stats")


def test_scores_are_counted_for_each_choice_that_repeats_them(api: Any) -> None:
    prompt = [1] * 400
    asked = {"prompt": [prompt] * 8, "max_tokens": 0, "echo": True, "logprobs": 20}
    assert api.complete(**asked, n=2).status == 200
    reply = api.complete(**asked, n=4)
    assert (reply.error["param"], reply.error["code"]) == ("logprobs", "integer_above_max_value")


def test_allowed_tools_without_tools_are_refused(api: Any) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    assert api.chat(tool_choice=choice).error["param"] == "tool_choice"
    flat = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    assert respond(api, tool_choice=flat).error["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (5, "invalid_type"),
        ({"text": "x"}, "invalid_type"),
        ({"type": 1, "text": "x"}, "invalid_type"),
        ({"type": "text"}, "invalid_type"),
        ({"type": "text", "text": 1}, "invalid_type"),
        ({"type": "text", "text": "x", "more": 1}, "invalid_type"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "unsupported_parameter"),
    ],
)
def test_a_part_that_is_no_text_is_refused_everywhere(api: Any, part: object, code: str) -> None:
    chat = api.chat(messages=[{"role": "user", "content": [part]}])
    assert (chat.status, chat.error["param"], chat.error["code"]) == (400, "messages[0].content", code)
    for item in (
        {"role": "user", "content": [part]},
        {"type": "function_call_output", "call_id": "1", "output": [part]},
    ):
        response = respond(api, input=[item])
        place = "input[0].content" if "role" in item else "input[0].output"
        assert (response.status, response.error["param"], response.error["code"]) == (400, place, code)


class Refusing:
    """A chat format that takes no conversation."""

    description = "refuses"

    def encode(self, messages: Any, **how: Any) -> Any:
        del messages, how
        raise ChatTemplateError("this conversation is not for this model")


def test_a_conversation_that_the_template_refuses_is_refused_in_the_endpoints_own_words(api: Any) -> None:
    refusing = api.with_deps(chat_template=Refusing())
    for reply, param in ((refusing.chat(), "messages"), (respond(refusing), "input")):
        assert (reply.status, reply.error["param"]) == (400, param)
        assert reply.error["message"] == f"'{param}': this conversation is not for this model."


def test_a_response_that_fails_closes_the_item_that_had_begun(api: Any, run: Any) -> None:
    api.engine.answer = None

    async def script() -> Any:
        call = run_send(api, stream=True)
        await api.engine.on_submit.wait()
        (request_id,) = api.engine.streams
        api.engine.streams[request_id].push(Delta(request_id=request_id, text="par", token_ids=(300,)))
        api.engine.end(request_id, "error", error="it broke")
        return await call

    events = events_of(run(script()))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "failed"]
    (item,) = events[-1]["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "par")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_log_probabilities_of_last_tokens_without_text_are_told_too(api: Any, run: Any) -> None:
    api.engine.answer = None
    include = ["message.output_text.logprobs"]

    async def script() -> Any:
        call = run_send(api, include=include)
        await api.engine.on_submit.wait()
        (request_id,) = api.engine.streams
        entry = TokenLogprob(300, -1.0, ())
        stream = api.engine.streams[request_id]
        stream.push(Delta(request_id=request_id, text="a", token_ids=(300,), logprobs=(entry,)))
        stream.push(Delta(request_id=request_id, token_ids=(300,), logprobs=(entry,)))
        api.engine.end(request_id, "stop", num_output_tokens=2)
        return await call

    (item,) = run(script()).json()["output"]
    assert len(item["content"][0]["logprobs"]) == 2


def run_send(api: Any, **fields: Any) -> Any:
    return asyncio.ensure_future(api.send("POST", "/v1/responses", {"model": "tiny", "input": "hello", **fields}))
