"""Every field that the installed ``openai`` package documents is known here, whatever version of it is installed."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat
from typing_extensions import is_typeddict

PATHS = {"/v1/chat/completions": chat, "/v1/completions": text}
GIVEN: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "prompt": "hello",
    "logit_bias": {"5": 1},
    "stream_options": {"include_usage": True, "include_obfuscation": True},
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "max_tokens": 16,
    "max_completion_tokens": 16,
}
"""Where a made-up value would break a rule between fields, or name what is not there."""

BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": GIVEN["messages"]},
    "/v1/completions": {"model": "tiny", "prompt": "hello"},
}


def fields(path: str) -> dict[str, Any]:
    """Name -> type of the streaming form, which has them all."""
    return get_type_hints(PATHS[path].CompletionCreateParamsStreaming)


def made_up(kind: Any) -> Any:
    """Some value of an annotated type, with every key of every object."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return inner[0]
    if origin in (typing.Required, typing.NotRequired):
        return made_up(inner[0])
    if origin is Union:
        return made_up(next(form for form in inner if form is not type(None)))
    if origin is dict:
        return {"key": made_up(inner[1])}
    if origin in (list, Sequence, Iterable, typing.get_origin(Iterable[int])):
        return [made_up(inner[0])]
    if is_typeddict(kind):
        return {name: made_up(value) for name, value in get_type_hints(kind).items()}
    return {str: "x", int: 1, float: 0.5, bool: True}.get(kind, {})


def everything(path: str) -> dict[str, Any]:
    return {name: GIVEN.get(name, made_up(kind)) for name, kind in fields(path).items()}


@pytest.mark.parametrize("path", PATHS)
def test_a_request_with_every_documented_field_is_served_where_fields_may_be_dropped(api: Any, path: str) -> None:
    reply = api.with_settings(unknown_fields="warn").call("POST", path, everything(path))
    assert reply.status == 200, reply.body
    assert reply.events[-1] == "[DONE]"
    assert reply.events[-2]["usage"]["total_tokens"] > 0
    dropped = reply.headers["x-mixtral-serve-warning"].removeprefix("ignored: ").split(", ")
    assert "stream_options.include_obfuscation" in dropped
    for name in dropped:
        outer, _, inner = name.partition(".")
        alone = BASE[path] | ({"stream": True} if inner else {}) | {outer: everything(path)[outer]}
        refused = api.call("POST", path, alone)
        assert refused.error["param"] == name, "what is dropped there is refused by name here"
        assert refused.error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("path", PATHS)
def test_no_documented_field_is_unknown(api: Any, path: str) -> None:
    for name, value in everything(path).items():
        reply = api.call("POST", path, BASE[path] | {name: value})
        assert reply.status == 200 or reply.error["code"] != "unknown_parameter", name
        assert reply.status == 200 or reply.error["param"].split(".")[0] == name
