"""Structured output at the API: what is asked for becomes a grammar; what cannot be kept is a 400 with the reason."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mixtral_serve.text.grammar import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
    user_grammar,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"name": "record", "schema": SCHEMA, "strict": True, "description": "a record"}


def test_text_is_no_constraint(api: Any) -> None:
    assert api.chat(response_format={"type": "text"}).status == 200
    assert api.engine.last.grammar is None
    assert api.complete().status == 200
    assert api.engine.last.grammar is None


@pytest.mark.parametrize(
    ("fields", "make"),
    [
        ({"response_format": {"type": "json_object"}}, json_object_grammar),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            lambda **lead: json_schema_grammar(SCHEMA, **lead),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, lambda **lead: json_schema_grammar(SCHEMA, **lead)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, lambda **lead: json_schema_grammar(SCHEMA, **lead)),
        ({"structured_outputs": {"json_object": True}}, json_object_grammar),
        ({"structured_outputs": {"regex": "[a-z]+"}}, lambda **lead: regex_grammar("[a-z]+", **lead)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, lambda **lead: choice_grammar(["a", "b"], **lead)),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, lambda **lead: user_grammar('start: "a"', **lead)),
        (
            {"structured_outputs": {"regex": "x"}, "response_format": {"type": "text"}},
            lambda **lead: regex_grammar("x", **lead),
        ),
    ],
)
def test_what_is_asked_for_becomes_the_grammar_of_every_choice(api: Any, fields: dict[str, Any], make: Any) -> None:
    assert api.chat(**fields, n=2).status == 200
    assert [submit.grammar for submit in api.engine.submits] == [make(after_space=True)] * 2
    assert all(submit.strip_leading_space for submit in api.engine.submits)
    assert api.complete(**fields).status == 200
    assert api.engine.last.grammar == make(after_space=False)


def test_an_answer_that_goes_on_with_a_message_does_not_begin_with_a_space(api: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the"}]
    reply = api.chat(messages=messages, continue_final_message=True, structured_outputs={"regex": "x"})
    assert reply.status == 200, reply.body
    assert api.engine.last.grammar == regex_grammar("x", after_space=False)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "Input should be"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' is given"),
        (
            {"response_format": {"type": "json_object", "json_schema": NAMED}},
            "response_format",
            "'json_schema' is given",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {"name": "secret name"}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": NAMED | {"schema": {"not": {"const": "secret"}}},
                }
            },
            "response_format.json_schema.schema",
            "the keyword 'not' is not supported",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "Exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "Exactly one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", ""),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "Unrecognized"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "A schema is"),
        ({"structured_outputs": {"json": "[secret"}}, "structured_outputs.json", "not a JSON object"),
        ({"structured_outputs": {"json": "x" * 70_000}}, "structured_outputs.json", "too long"),
        ({"structured_outputs": {"json": {"const": "x" * 70_000}}}, "structured_outputs.json", "larger than"),
        (
            {"structured_outputs": {"json": {"type": "integer", "multipleOf": 99991}}},
            "structured_outputs.json",
            "common",
        ),
        ({"structured_outputs": {"regex": "secret("}}, "structured_outputs.regex", "not valid"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", ""),
        ({"structured_outputs": {"grammar": "start: secret"}}, "structured_outputs.grammar", "not a valid grammar"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "contradict",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name_with_the_reason_and_without_the_input(
    api: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    for reply in (api.chat(**fields), api.complete(**fields)):
        assert reply.status == 400, reply.body
        assert reply.error["param"] == param
        assert words in reply.error["message"]
        assert b"secret" not in reply.body
    assert not api.engine.submits
    api.assert_alive()


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
def test_the_old_names_are_refused_with_the_new_one(api: Any, name: str) -> None:
    error = api.chat(**{name: "x"}).error
    assert error["param"] == name
    assert "'structured_outputs'" in error["message"]


def test_structured_outputs_and_tools_contradict_each_other_unless_no_tool_is_offered(api: Any) -> None:
    asked = {"structured_outputs": {"regex": "a"}, "tools": [{"type": "function", "function": {"name": "time"}}]}
    assert api.chat(**asked).error["param"] == "structured_outputs"
    assert api.chat(**asked, tool_choice="none").status == 200
    assert api.engine.last.grammar == regex_grammar("a", after_space=True)


def test_the_event_loop_turns_while_grammars_are_compiled(api: Any, run: Any) -> None:
    branches = [
        {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": k}}} for k in range(3)]} for i in range(6)
    ]

    async def scenario() -> None:
        body = {"model": "tiny", "prompt": "hello", "structured_outputs": {"json": {"allOf": branches}}}
        slow = asyncio.create_task(api.send("POST", "/v1/completions", body))
        others = 0
        while not slow.done():
            assert (await api.send("GET", "/livez")).status == 200
            others += 1
        assert (await slow).status in (200, 400)
        assert others > 10

    run(scenario())
