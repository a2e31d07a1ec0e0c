"""Bodies that begin as good ones: any part of them is replaced, dropped or buried, and a canary follows each.

``test_bad_input`` gives single fields any value; here the damage is anywhere in a whole request, as deep as its tools,
schemas and parts of messages go. Which fields there are is what the published document says.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_serve.api.openapi import OPERATIONS, openapi_document

LEAKS: Final = re.compile(rb'0x[0-9a-f]{6,}|File "|Traceback|site-packages')
PARAMETERS: Final = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
FUNCTION: Final = {"name": "f", "description": "d", "parameters": PARAMETERS, "strict": True}
CALL: Final = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "x"}'}}
MESSAGES: Final = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": " you"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "user", "content": "thanks"},
]
SAMPLING: Final = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 1,
    "logit_bias": {"5": 1.5},
    "bad_words": ["x"],
}
FORMAT: Final = {"name": "s", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}, "strict": True}
ITEMS: Final = [
    {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    {"type": "message", "role": "user", "content": "thanks"},
]
TOOLS: Final = [{"type": "function", "function": FUNCTION}]
CONVERSATION: Final = {"messages": MESSAGES, "tools": TOOLS}
BODIES: Final[list[tuple[str, dict[str, Any]]]] = [
    (
        "/v1/chat/completions",
        {"model": "tiny", **CONVERSATION, **SAMPLING, "tool_choice": "auto", "metadata": {"a": "b"}},
    ),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": MESSAGES[:2],
            "response_format": {"type": "json_schema", "json_schema": FORMAT},
            "logprobs": True,
            "top_logprobs": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", [5, 6]], "echo": True, "logprobs": 1, **SAMPLING}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "structured_outputs": {"choice": ["a", "b"]}, "stop": ["x"]}),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "input": ITEMS,
            "instructions": "i",
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "text": {"format": {"type": "json_schema", **FORMAT}},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
        },
    ),
    ("/v1/responses", {"model": "tiny", "input": "a", "stream": True, "metadata": {"a": "b"}, **SAMPLING}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", [5, 6]], "encoding_format": "base64", "dimensions": 2}),
    ("/tokenize", {"model": "tiny", "prompt": "a", "add_special_tokens": False, "return_token_strs": True}),
    ("/tokenize", {**CONVERSATION, "add_generation_prompt": True}),
    ("/detokenize", {"model": "tiny", "tokens": [5, 6]}),
    ("/apply-template", {**CONVERSATION, "continue_final_message": False}),
]


def buried(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"properties": value}
    return value


HOSTILE: Final = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 2**70, 0.5, -0.0, 1e308, [], {}]),
    st.sampled_from([float("nan"), float("inf"), "", "x", "0", "\x00", "\ud800", "\u202e", "😀" * 40, "x" * 5000]),
    st.sampled_from(
        [[[]], [None], [{}], {"": {}}, {"$ref": "#"}, {"type": ["object", 5]}, {"type": "object"}, ["x"] * 2000]
    ),
    st.builds(buried, st.sampled_from(["x", 5, {}]), st.integers(1, 120)),
    st.text(max_size=12),
    st.dictionaries(st.text(max_size=6), st.none() | st.integers() | st.text(max_size=4), max_size=3),
)


def fields_of(path: str) -> list[str]:
    """Every parameter that the document lists, those too that are refused."""
    document = openapi_document("0")
    bodies = next(each.body for each in OPERATIONS if each.path == path)
    return sorted({name for body in bodies for name in document["components"]["schemas"][body.__name__]["properties"]})


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path, good = draw(st.sampled_from(BODIES))
    body = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["replace", "replace", "drop", "repeat", "add"]))
        if kind == "add" or not body:
            body[draw(st.sampled_from(fields_of(path)) | st.text(max_size=8))] = copy.deepcopy(draw(HOSTILE))
            continue
        container, key = draw(st.sampled_from(places(body)))
        if kind == "drop":
            del container[key]
        elif kind == "repeat" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(draw(HOSTILE))
    return path, body


def send_and_check(api: Any, case: tuple[str, dict[str, Any]]) -> None:
    path, body = case
    before = len(api.engine.submits)
    reply = api.call("POST", path, json.dumps(body).encode())
    assert reply.status in (200, 400, 404), reply.body
    assert not LEAKS.search(reply.body)
    if reply.status != 200:
        assert reply.error["code"]
        assert len(api.engine.submits) == before, "what is refused computes nothing"
    api.assert_alive()


QUICK: Final = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_the_bodies_that_are_damaged_are_good_ones(api: Any, path: str, body: dict[str, Any]) -> None:
    assert set(body) <= set(fields_of(path))
    assert api.call("POST", path, body).status == 200


@QUICK
@given(case=damaged())
def test_row16_a_damaged_body_is_served_or_refused_and_the_next_one_is_served(
    api: Any, case: tuple[str, dict[str, Any]]
) -> None:
    send_and_check(api, case)


@pytest.mark.slow
@settings(QUICK, max_examples=1500)
@given(case=damaged())
def test_row16_many_damaged_bodies_are_served_or_refused(api: Any, case: tuple[str, dict[str, Any]]) -> None:
    send_and_check(api, case)
