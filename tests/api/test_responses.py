"""``POST /v1/responses``: text, items, events, functions, and everything that is not there refused by name."""

from __future__ import annotations

import asyncio
import json
from array import array
from typing import Any

import pytest

from mixtral_serve.engine.messages import Delta
from scheduler.events import TokenLogprob

PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "get_time",
    "description": "Tells the time.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '[{"name": "get_time", "arguments": {"city": "Rome"}}, {"name": "get_time", "arguments": {"city": "Oslo"}}]'
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get_time", "arguments": "{}", "status": None},
    {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "noon"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "night"}]},
    {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Noon.", "annotations": [], "logprobs": []}],
    },
    {"role": "user", "content": "And now?"},
]


def respond(api: Any, **fields: Any) -> Any:
    return api.call("POST", PATH, {"model": "tiny", "input": "hello"} | fields)


def events_of(reply: Any) -> list[dict[str, Any]]:
    """A stream's events; each frame is checked for its name and number."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.body.decode().split("\n\n")
    assert frames.pop() == ""
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def test_a_text_is_answered_with_a_message(api: Any) -> None:
    answer = respond(api).json()
    (item,) = answer["output"]
    assert answer["id"].startswith("resp_") or answer["id"].startswith("resp-")
    assert (answer["object"], answer["status"], answer["error"], answer["store"]) == (
        "response",
        "completed",
        None,
        False,
    )
    assert answer["created_at"] == answer["completed_at"] == 1_700_000_000
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}]
    usage = answer["usage"]
    assert usage["input_tokens"] == len(api.engine.last.prompt) // 4
    assert (usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (12, 3)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_the_conversation_is_that_of_a_chat_with_the_same_messages(api: Any) -> None:
    respond(api, instructions="Be short.")
    api.chat(messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}])
    respond(api, input=ITEMS)
    calls = [
        {"id": name, "type": "function", "function": {"name": "get_time", "arguments": "{}"}} for name in ("c1", "c2")
    ]
    api.chat(
        messages=[
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            {"role": "tool", "tool_call_id": "c2", "content": "night"},
            {"role": "assistant", "content": "Noon."},
            {"role": "user", "content": "And now?"},
        ]
    )
    prompts = [list(array("i", submit.prompt)) for submit in api.engine.submits]
    assert prompts[0] == prompts[1]
    assert prompts[2] == prompts[3]


def test_an_answer_can_be_sent_back_as_it_came(api: Any) -> None:
    output = respond(api, tools=[TOOL]).json()["output"]
    assert (
        respond(api, input=[{"role": "user", "content": "x"}, *output, {"role": "user", "content": "y"}]).status == 200
    )


def test_a_stream_tells_each_part_from_its_beginning_to_its_end(api: Any) -> None:
    api.engine.answer = "hi"
    events = events_of(respond(api, stream=True))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert "".join(event["delta"] for event in events if "delta" in event) == events[6]["text"] == "hi"
    assert {event["item_id"] for event in events if "item_id" in event} == {events[2]["item"]["id"]}
    done = events[-1]["response"]
    assert done["output"] == [events[8]["item"]]
    assert (done["status"], done["usage"]["output_tokens"]) == ("completed", 3)


def test_the_end_of_a_stream_is_the_whole_answer(api: Any) -> None:
    fields = {"tools": [TOOL], "temperature": 0.5, "metadata": {"a": "b"}, "instructions": "Be short.", "user": "u"}
    for text in ("hello", CALL):
        api.engine.answer = text
        streamed = events_of(respond(api, stream=True, **fields))[-1]["response"]
        whole = respond(api, **fields).json()
        for answer in (streamed, whole):
            del answer["id"]
            for item in answer["output"]:
                item["id"] = item["call_id"] = ""
        assert streamed == whole


def test_a_response_repeats_what_it_was_asked(api: Any) -> None:
    answer = respond(
        api, temperature=0.5, top_p=0.9, max_output_tokens=20, metadata={"a": "b"}, user="u", parallel_tool_calls=False
    ).json()
    assert (answer["temperature"], answer["top_p"], answer["max_output_tokens"]) == (0.5, 0.9, 20)
    assert (answer["metadata"], answer["user"], answer["parallel_tool_calls"]) == ({"a": "b"}, "u", False)
    assert (answer["truncation"], answer["background"], answer["service_tier"]) == ("disabled", False, "default")
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    submit = api.engine.last
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.max_tokens) == (0.5, 0.9, 20)


def test_an_answer_that_was_cut_is_incomplete(api: Any, run: Any) -> None:
    api.engine.answer = None

    async def scenario(*, stream: bool) -> Any:
        api.engine.on_submit = asyncio.Event()
        asked = asyncio.create_task(api.send("POST", PATH, {"model": "tiny", "input": "x", "stream": stream}))
        await api.engine.on_submit.wait()
        api.engine.say(api.engine.last.request_id, "ab", reason="length")
        return await asked

    answer = run(scenario(stream=False)).json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (answer["output"][0]["status"], answer["completed_at"]) == ("incomplete", None)
    last = events_of(run(scenario(stream=True)))[-1]
    assert (last["type"], last["response"]["output"][0]["status"]) == ("response.incomplete", "incomplete")


def test_an_answer_without_a_word_is_a_message_without_text(api: Any) -> None:
    api.engine.answer = ""
    (item,) = respond(api).json()["output"]
    assert item["content"][0]["text"] == ""
    events = events_of(respond(api, stream=True))
    assert [event["type"] for event in events][-2:] == ["response.output_item.done", "response.completed"]


def test_log_probabilities_are_included_where_asked(api: Any) -> None:
    api.engine.answer = "hi"
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    logprobs = respond(api, **asked).json()["output"][0]["content"][0]["logprobs"]
    assert [len(entry["top_logprobs"]) for entry in logprobs] == [2, 2]
    deltas = [event for event in events_of(respond(api, stream=True, **asked)) if "delta" in event]
    assert [entry for event in deltas for entry in event["logprobs"]] == logprobs
    assert api.engine.last.sampling.logprobs == 2
    assert respond(api, include=["reasoning.encrypted_content"]).status == 200


def test_log_probabilities_of_held_back_tokens_come_with_the_next_text(api: Any, run: Any) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        body = {"model": "tiny", "input": "x", "stream": True, "include": ["message.output_text.logprobs"]}
        asked = asyncio.create_task(api.send("POST", PATH, body))
        await api.engine.on_submit.wait()
        request_id = api.engine.last.request_id
        entry = TokenLogprob(token_id=300, logprob=-1.0, top=())
        for text in ("", "é"):
            api.engine.streams[request_id].push(Delta(request_id=request_id, text=text, logprobs=(entry,)))
        api.engine.end(request_id, "stop")
        deltas = [event for event in events_of(await asked) if "delta" in event]
        assert [(event["delta"], len(event["logprobs"])) for event in deltas] == [("é", 2)]

    run(scenario())


def test_functions_are_called_in_items_of_their_own(api: Any) -> None:
    api.engine.answer = CALL
    answer = respond(api, tools=[TOOL], tool_choice="required").json()
    first, second = answer["output"]
    assert (first["type"], first["name"], first["status"]) == ("function_call", "get_time", "completed")
    assert [json.loads(item["arguments"]) for item in (first, second)] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert len({first["id"], second["id"], first["call_id"], second["call_id"]}) == 4
    assert answer["tools"] == [TOOL]
    assert answer["tool_choice"] == "required"
    assert api.engine.last.grammar is not None


def test_a_stream_tells_calls_one_after_the_other(api: Any) -> None:
    api.engine.answer = CALL
    events = events_of(respond(api, tools=[TOOL], stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert "output_text.delta" not in kinds
    steps = [kind for kind in kinds if kind != "function_call_arguments.delta"]
    call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert steps == ["created", "in_progress", *call, *call, "completed"]
    for index, city in enumerate(("Rome", "Oslo")):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"]["arguments"] == ""
        arguments = "".join(event["delta"] for event in own if "delta" in event)
        assert json.loads(arguments) == {"city": city}
        assert own[-2]["arguments"] == own[-1]["item"]["arguments"] == arguments


def test_with_functions_a_text_is_still_a_text(api: Any) -> None:
    api.engine.answer = "[{ is no call"
    assert respond(api, tools=[TOOL]).json()["output"][0]["content"][0]["text"] == "[{ is no call"


def test_a_function_can_be_demanded_or_allowed(api: Any) -> None:
    api.engine.answer = CALL
    named = {"type": "function", "name": "get_time"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    for choice in (named, allowed):
        answer = respond(api, tools=[TOOL], tool_choice=choice)
        assert answer.json()["tool_choice"] == choice


@pytest.mark.parametrize(
    "text_format",
    [{"type": "json_object"}, {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}],
)
def test_the_form_of_the_text_is_constrained(api: Any, text_format: dict[str, Any]) -> None:
    answer = respond(api, text={"format": text_format}).json()
    assert answer["text"]["format"] == text_format
    assert api.engine.last.grammar is not None
    assert respond(api, text={"format": {"type": "text"}}).status == 200
    assert api.engine.last.grammar is None


@pytest.mark.parametrize("silent", [True, False])
def test_a_stream_that_fails_ends_with_a_failed_response(api: Any, run: Any, silent: bool) -> None:
    api.engine.answer = None

    async def scenario() -> Any:
        asked = asyncio.create_task(api.send("POST", PATH, {"model": "tiny", "input": "x", "stream": True}))
        await api.engine.on_submit.wait()
        request_id = api.engine.last.request_id
        if not silent:
            api.engine.say(request_id, "ab", reason=None)
        api.engine.end(request_id, "error", error="at /home")
        return await asked

    reply = run(scenario())
    if silent:
        assert (reply.status, reply.error["code"]) == (500, "generation_failed")
        return
    last = events_of(reply)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "The model failed on this request."}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "empty_array"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [{"role": "user", "content": "x"}] * 1025}, "input", "array_above_max_length"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]", "invalid_value"),
        ({"input": [5]}, "input[0]", "invalid_value"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content",
            "unsupported_parameter",
        ),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour", "unknown_parameter"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0]", "invalid_value"),
        ({"input": "x " * 20_000}, "input", "context_length_exceeded"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", None),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour", "unknown_parameter"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "missing_required_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "invalid_value"),
        ({"tools": [TOOL | {"parameters": {"type": "string"}}]}, "tools[0].parameters", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice", None),
        ({"include": ["everything"]}, "include[0]", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_its_own_name(api: Any, fields: dict[str, Any], param: str, code: str) -> None:
    reply = respond(api, **fields)
    if fields.get("stream_options") == {"include_usage": True}:
        assert reply.status == 200, "the counts come anyway"
        return
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert code in (None, reply.error["code"])
    assert "messages" not in reply.error["message"]
    assert api.engine.submits == []


def test_instructions_shift_no_names(api: Any) -> None:
    items = [{"role": "user", "content": "x"}, {"type": "function_call_output", "call_id": "c", "output": "x"}]
    reply = respond(api, input=items, instructions="Be short.")
    assert (reply.status, reply.error["param"]) == (400, "input[1]")
    assert "'input[1]'" in reply.error["message"]


def test_leaving_cancels_the_request(api: Any, run: Any, start_exchange: Any) -> None:
    api.engine.answer = None

    async def scenario(*, stream: bool) -> None:
        body = json.dumps({"model": "tiny", "input": "x", "stream": stream}).encode()
        call = start_exchange(api.app, "POST", PATH, body)
        task = call.start()
        while not api.engine.submits:
            await asyncio.sleep(0)
        call.left.set()
        await task
        assert api.engine.cancelled == [api.engine.submits.pop().request_id]
        api.engine.cancelled.clear()

    run(scenario(stream=True))
    run(scenario(stream=False))
