from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '[{"name": "weather", "arguments": {"city": "Oslo }]\\""}}]'
ARGUMENTS = '{"city": "Oslo }]\\""}'
TWO_CALLS = '[{"name": "weather", "arguments": {"city": "a"}}, {"name": "time", "arguments": {}}]'


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def prompt_of(api: Any) -> str:
    ids = array("i")
    ids.frombytes(api.engine.last.prompt)
    text: str = api.deps.tokenizer.decode(ids)
    return text


def choice_of(api: Any, **fields: Any) -> dict[str, Any]:
    reply = api.chat(**{"tools": [WEATHER, TIME], **fields})
    assert reply.status == 200, reply.body
    answer = reply.json()
    ChatCompletion.model_validate(answer, strict=True)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def streamed(api: Any, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    events = api.chat(**{"tools": [WEATHER, TIME], "stream": True, **fields}).events
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    return [choice for event in events for choice in event["choices"]]


def test_a_call_has_openais_form(api: Any) -> None:
    api.engine.answer = CALL
    choice = choice_of(api)
    call_id = choice["message"]["tool_calls"][0]["id"]
    assert call_id.startswith("call_")
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    }
    assert choice["finish_reason"] == "tool_calls"


def test_several_calls_have_ids_of_their_own(api: Any) -> None:
    api.engine.answer = TWO_CALLS
    answer = api.chat(tools=[WEATHER, TIME], n=2).json()
    calls = [call for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert [call["function"]["name"] for call in calls] == ["weather", "time"] * 2
    assert len({call["id"] for call in calls}) == 4


@pytest.mark.parametrize("text", ["hello", "[1, 2]", "[", '[{"name', ""])
def test_an_answer_in_text_is_content_to_the_letter(api: Any, text: str) -> None:
    api.engine.answer = text
    choice = choice_of(api)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    chunks = streamed(api)
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text
    assert all("tool_calls" not in chunk["delta"] for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "stop"


def test_a_streamed_call_comes_in_openais_pieces(api: Any) -> None:
    api.engine.answer = TWO_CALLS
    chunks = streamed(api)
    assert chunks[0]["delta"] == {"role": "assistant", "content": None}
    assert all(not chunk["delta"].get("content") for chunk in chunks), "no JSON of a call is content"
    assert (chunks[-1]["delta"], chunks[-1]["finish_reason"]) == ({}, "tool_calls")
    deltas = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    firsts = [delta for delta in deltas if "id" in delta]
    assert [(first["index"], first["type"], first["function"]) for first in firsts] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "time", "arguments": ""}),
    ]
    assert len({first["id"] for first in firsts}) == 2
    pieces: dict[int, str] = {0: "", 1: ""}
    for delta in deltas:
        assert set(delta) == ({"index", "id", "type", "function"} if delta in firsts else {"index", "function"})
        pieces[delta["index"]] += delta["function"]["arguments"]
    assert pieces == {0: '{"city": "a"}', 1: "{}"}


def test_the_streams_of_several_choices_do_not_mix(api: Any) -> None:
    api.engine.answer = None
    original = api.engine.submit

    def submit(requests: Any) -> Any:
        streams = original(requests)
        api.engine.say(requests[0].request_id, CALL)
        api.engine.say(requests[1].request_id, "hello")
        return streams

    api.engine.submit = submit
    chunks = streamed(api, n=2)
    said = {0: "", 1: ""}
    for chunk in chunks:
        said[chunk["index"]] += chunk["delta"].get("content") or ""
        for call in chunk["delta"].get("tool_calls", []):
            assert chunk["index"] == 0
            said[0] += call["function"]["arguments"]
    assert said == {0: ARGUMENTS, 1: "hello"}


def test_the_finish_reason_of_a_named_function_is_stop(api: Any) -> None:
    api.engine.answer = CALL
    for choice, reason in ((named("weather"), "stop"), ("required", "tool_calls"), ("auto", "tool_calls")):
        assert choice_of(api, tool_choice=choice)["finish_reason"] == reason
        assert streamed(api, tool_choice=choice)[-1]["finish_reason"] == reason


@pytest.mark.parametrize(
    ("text", "arguments"),
    [(CALL[:30], None), (CALL[:46], '{"city": "Os'), (TWO_CALLS[:47], '{"city": "a"}'), ('[{"na', None)],
)
def test_a_call_that_is_cut_short_is_told_as_far_as_it_came(api: Any, text: str, arguments: str | None) -> None:
    api.engine.answer = None
    original = api.engine.submit

    def submit(requests: Any) -> Any:
        streams = original(requests)
        api.engine.say(requests[0].request_id, text, reason="length")
        return streams

    api.engine.submit = submit
    choice = choice_of(api)
    assert choice["finish_reason"] == "length"
    calls = choice["message"].get("tool_calls", [])
    assert [call["function"]["arguments"] for call in calls] == ([] if arguments is None else [arguments])
    assert not choice["message"]["content"]
    chunks = streamed(api)
    deltas = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == (arguments or "")
    assert chunks[-1]["finish_reason"] == "length"


def test_what_the_model_is_shown(api: Any) -> None:
    described = {"type": "function", "function": {"name": "time", "description": "é", "parameters": {"type": "object"}}}
    shown = json.dumps([described], ensure_ascii=False)
    given = {"function": {**described["function"], "strict": True}, "type": "function"}  # type: ignore[dict-item]
    api.chat(tools=[given], messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    assert prompt_of(api) == f"[INST] be kind\n\nYou can call these functions: {shown}\n\nhi [/INST]"
    api.chat(tools=[given], tool_choice="none", messages=[{"role": "user", "content": "hi"}])
    assert prompt_of(api) == "[INST] hi [/INST]"
    assert api.engine.last.grammar is None


def conversation(*results: dict[str, Any], calls: int = 2) -> list[dict[str, Any]]:
    called = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "f", "arguments": f'{{"x":{i}}}'}}
        for i in range(calls)
    ]
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": called},
        *({"role": "tool", **result} for result in results),
    ]


def test_results_come_back_in_the_order_of_their_calls(api: Any) -> None:
    parts = [{"type": "text", "text": "two"}]
    messages = conversation(
        {"tool_call_id": "call_1", "content": parts, "name": "f"}, {"tool_call_id": "call_0", "content": "one"}
    )
    reply = api.chat(messages=[*messages, {"role": "user", "content": "and?"}])
    assert reply.status == 200
    assert prompt_of(api) == (
        '[INST] hi [/INST] [{"name": "f", "arguments": {"x": 0}}, {"name": "f", "arguments": {"x": 1}}] '
        "[INST] Result of f: one\n\nResult of f: two\n\nand? [/INST]"
    )


def test_an_answer_with_calls_can_be_sent_back_as_it_came(api: Any) -> None:
    api.engine.answer = CALL
    message = ChatCompletion.model_validate(api.chat(tools=[WEATHER]).json()).choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    for sent in (message.model_dump(), message.model_dump(exclude_none=True)):
        reply = api.chat(messages=[{"role": "user", "content": "hi"}, sent, result], tools=[WEATHER])
        assert reply.status == 200, reply.body
        assert CALL + " [INST] Result of weather: rain [/INST]" in prompt_of(api)


def test_the_grammar_of_a_request_is_that_of_its_choice(api: Any) -> None:
    def grammar(**fields: Any) -> str:
        api.chat(tools=[WEATHER, TIME], **fields)
        return str(api.engine.last.grammar)

    auto = grammar()
    assert auto == grammar(tool_choice="auto")
    only_time = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("time")]}}
    assert len({auto, *(grammar(tool_choice=c) for c in ("required", named("time"), named("weather")))}) == 4
    assert grammar(tool_choice=only_time, parallel_tool_calls=False) == grammar(tool_choice=named("time"))
    assert grammar(tool_choice="required", parallel_tool_calls=False) != grammar(tool_choice="required")
    assert "weather" not in grammar(tool_choice=only_time)


def formatted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def test_text_beside_tools_may_have_a_format_of_its_own(api: Any) -> None:
    asked = formatted({"type": "object", "properties": {"secret": {"type": "integer"}}})
    any_object, any_text = ({"response_format": {"type": kind}} for kind in ("json_object", "text"))
    for fields, is_there in ((asked, True), (any_object, False), (any_text, False)):
        assert api.chat(tools=[TIME], **fields).status == 200
        assert ("secret" in api.engine.last.grammar) == is_there
    api.engine.answer = '{"secret": 1}'
    assert choice_of(api, **asked)["message"]["content"] == '{"secret": 1}'


def long_schema() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [TIME, TIME]}, "tools[1].function.name"),
    ({"tools": [TIME] * 129}, "tools"),
    (tool(name="no good"), "tools[0].function.name"),
    (tool(name="x" * 65), "tools[0].function.name"),
    (tool(parameters={"type": "string"}), "tools[0].function.parameters"),
    (tool(parameters={"type": "object", "properties": 3}), "tools[0].function.parameters"),
    (tool(parameters={"type": "object", "not": {}}), "tools[0].function.parameters"),
    (tool(parameters=long_schema()), "tools[0].function.parameters"),
    (tool(colour="red"), "tools[0].function.colour"),
    ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "auto"}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": named("weather")}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {
            "tools": [TIME],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("x")]}},
        },
        "tool_choice.allowed_tools.tools[0].function.name",
    ),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
    ({"messages": conversation({"content": "x"})}, "messages[2].tool_call_id"),
    ({"messages": conversation({"tool_call_id": "call_0"})}, "messages[2].content"),
    ({"messages": conversation({"tool_call_id": "call_0", "content": "x", "name": "g"})}, "messages[2].name"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    (tool() | formatted({"type": "array"}), "response_format.json_schema.schema"),
    (tool() | formatted({"type": "object", "not": {}}), "response_format.json_schema.schema"),
    (tool() | {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}]},
        "messages[0].function_call",
    ),
]


@pytest.mark.parametrize(("fields", "param"), FAULTS)
def test_what_is_wrong_with_tools_is_named(api: Any, fields: dict[str, Any], param: str) -> None:
    reply = api.chat(**fields)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    api.assert_alive()


def test_a_call_that_is_none_after_all_is_an_error_and_no_content(api: Any) -> None:
    api.engine.answer = '[{"name": "weather", "argh": 1}]'
    assert api.chat(tools=[WEATHER]).status == 500
    events = api.chat(tools=[WEATHER], stream=True).events
    assert not any(choice["delta"].get("content") for event in events[:-1] for choice in event.get("choices", []))
    assert any("error" in event for event in events if event != "[DONE]")


def test_logprobs_and_token_ids_of_a_call_are_all_there(api: Any) -> None:
    api.engine.answer = CALL
    chunks = streamed(api, return_token_ids=True)
    assert sum(len(chunk.get("token_ids", [])) for chunk in chunks) == len(CALL)


def open_ended(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The capital "}], **fields}


def test_the_final_message_is_continued_where_that_is_asked(api: Any) -> None:
    assert api.chat(**open_ended(continue_final_message=True)).status == 200
    assert prompt_of(api) == "[INST] a [/INST] The capital "
    assert api.engine.last.strip_leading_space is False, "the text goes on"
    api.chat(**open_ended(continue_final_message=True, add_generation_prompt=False))
    assert prompt_of(api) == "[INST] a [/INST] The capital "
    api.chat(**open_ended())
    assert api.engine.last.strip_leading_space is True


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (open_ended(continue_final_message=True, add_generation_prompt=True), "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        (open_ended(continue_final_message=True, tools=[TIME]), "continue_final_message"),
        ({"messages": conversation(), "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_a_continuation_that_cannot_be_is_refused(api: Any, fields: dict[str, Any], param: str) -> None:
    assert (api.chat(**fields).status, api.chat(**fields).error["param"]) == (400, param)
    assert api.chat(**open_ended(continue_final_message=True, tools=[TIME], tool_choice="none")).status == 200
