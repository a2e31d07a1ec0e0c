"""Whatever a client sends: a 4xx in the envelope that names the field, a small body, and an engine untouched."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "hello"}

# field(s) -> (param, code)
BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": {}}, "messages", "invalid_type"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
    ({"messages": [{}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    (
        {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[1].tool_calls[0].id",
        "missing_required_parameter",
    ),
    ({"messages": [USER | {"name": "bob"}]}, "messages[0].name", "unsupported_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
        "messages[0].content",
        "invalid_type",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]},
        "messages[0].content",
        "array_above_max_length",
    ),
    ({"messages": [USER] * 1025}, "messages", "array_above_max_length"),
    ({"messages": [{"role": "user", "content": "the " * 600}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * 900_000}]}, "messages", "context_length_exceeded"),
    ({"max_tokens": 600}, "messages", "context_length_exceeded"),
    ({"model": "nope"}, "model", "model_not_found"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": ""}, "model", "empty_string"),
    ({"model": "x" * 257}, "model", "string_above_max_length"),
    ({"model": None}, "model", "missing_required_parameter"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "integer_above_max_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "integer_below_min_value"),
]
BAD_COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": [[]]}, "prompt", "empty_array"),
    ({"prompt": 5}, "prompt", "invalid_type"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
    ({"prompt": [True]}, "prompt", "invalid_type"),
    ({"prompt": [1.5]}, "prompt", "invalid_type"),
    ({"prompt": [[1, None]]}, "prompt", "invalid_type"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": [377]}, "prompt", "invalid_value"),
    ({"prompt": [2**31]}, "prompt", "invalid_value"),
    ({"prompt": [10**30]}, "prompt", "invalid_value"),
    ({"prompt": [5] * 512}, "prompt", "context_length_exceeded"),
    ({"prompt": [5], "max_tokens": 512}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 129}, "prompt", "array_above_max_length"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "integer_above_max_value"),
    ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
    ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"echo": 1}, "echo", "invalid_type"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"min_tokens": 17}, "min_tokens", "integer_above_max_value"),
]
BAD_SHARED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 17}, "n", "integer_above_max_value"),
    ({"n": 10**9}, "n", "integer_above_max_value"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"n": True}, "n", "invalid_type"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"temperature": math.nan}, "temperature", "invalid_value"),
    ({"temperature": math.inf}, "temperature", "invalid_value"),
    ({"top_p": -math.inf}, "top_p", "invalid_value"),
    ({"top_p": 0}, "top_p", "decimal_below_min_value"),
    ({"top_p": 1.01}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"min_p": 1.5}, "min_p", "decimal_above_max_value"),
    ({"seed": 2**63}, "seed", "integer_above_max_value"),
    ({"seed": 10**400}, "seed", "integer_above_max_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 2**31}, "max_tokens", "integer_above_max_value"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "integer_above_max_value"),
    ({"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
    ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
    ({"stop": ""}, "stop[0]", "empty_string"),
    ({"stop": "x" * 65}, "stop[0]", "string_above_max_length"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"stop_token_ids": [377]}, "stop_token_ids", "invalid_value"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
    ({"stop_token_ids": [5] * 65}, "stop_token_ids", "array_above_max_length"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"priority": 2**31}, "priority", "integer_above_max_value"),
    ({"cache_salt": "x" * 129}, "cache_salt", "string_above_max_length"),
    ({"user": "x" * 513}, "user", "string_above_max_length"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "array_above_max_length"),
    ({"user": "a\0b"}, "user", "invalid_value"),
    ({"user": "a\ud800b"}, "user", "invalid_value"),
    ({"nonsense": 1}, "nonsense", "unknown_parameter"),
]


def short(case: object) -> str:
    return str(case)[:60]


def assert_refused(api: Any, path: str, body: Any, param: str | None, code: str) -> None:
    reply = api.call("POST", path, body)
    status = 404 if code == "model_not_found" else 400
    assert (reply.status, reply.error["param"], reply.error["code"]) == (status, param, code), reply.body
    assert reply.error["type"] == "invalid_request_error"
    assert api.engine.submits == [], "the engine is untouched"
    api.assert_alive()


@pytest.mark.parametrize(("fields", "param", "code"), BAD_CHAT + BAD_SHARED, ids=short)
def test_row15_bad_chat_fields_are_named(api: Any, fields: dict[str, Any], param: str, code: str) -> None:
    assert_refused(api, CHAT, {"model": "tiny", "messages": [USER]} | fields, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), BAD_COMPLETION + BAD_SHARED, ids=short)
def test_row17_bad_completion_fields_are_named(api: Any, fields: dict[str, Any], param: str, code: str) -> None:
    assert_refused(api, COMPLETIONS, {"model": "tiny", "prompt": "hello"} | fields, param, code)


AT_THE_LIMIT: list[dict[str, Any]] = [
    {"n": 16},
    {"stop": ["x" * 64] * 4},
    {"temperature": 2, "top_p": 1, "min_p": 1, "top_k": 2**31 - 1},
    {"seed": 2**63 - 1},
    {"seed": -(2**63)},
    {"stop_token_ids": [376] * 64},
    {"cache_salt": "x" * 128, "user": "x" * 512},
    {"priority": -(2**31) + 1},
    {"max_tokens": 500},
    {"max_tokens": 6, "min_tokens": 6},
]


@pytest.mark.parametrize("fields", AT_THE_LIMIT, ids=short)
def test_row15_values_at_the_limit_are_accepted(api: Any, fields: dict[str, Any]) -> None:
    assert api.chat(**fields).status == 200
    assert api.complete(**fields).status == 200


def test_row15_the_largest_lists_are_accepted(api: Any) -> None:
    assert api.complete(prompt=["a"] * 128).status == 200
    assert api.complete(prompt=[5] * 511, max_tokens=1).status == 200
    assert api.chat(messages=[{"role": "user", "content": ""}] * 128).status == 200
    assert api.chat(logprobs=True, top_logprobs=20).status == 200
    assert api.complete(logprobs=20).status == 200


RAW: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"null", None),
    (b"[]", None),
    (b'"x"', None),
    (b"5", None),
    (b"\xff\xfe", None),
    (b'{"model": "tiny"} x', None),
    (b"\xef\xbb\xbf{}", None),
    (b'{"model": "tiny", "prompt": "a\x00b"}', None),
    (b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "prompt"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', "prompt"),
    (b'{"model": "tiny", "prompt": "\\udc00\\ud800"}', "prompt"),
    (b'{"model": "tiny", "prompt": ["a", "\\ud800"]}', "prompt[1]"),
    (b'{"model": "tiny", "prompt": "a\\u0000b"}', "prompt"),
    (b'{"model": "tiny", "prompt": "a", "a\\u0000": 1}', "a?"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}', "temperature"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"model": "tiny", "prompt": "a", "temperature": -1e999}', "temperature"),
    (b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 5000 + b"}", "n"),
    (b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 100_000 + b"}", None),
    (b"[" * 200_000, None),
    (b'{"a":' * 200_000, None),
    (b'{"prompt":' * 90_000 + b"1" + b"}" * 90_000, None),
    (b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt"),
    (b'{"model": "tiny", "prompt": "a", "metadata": ' + b'{"a":' * 400 + b"1" + b"}" * 401, "metadata.a"),
]


@pytest.mark.parametrize(("body", "param"), RAW, ids=short)
def test_row13_odd_bodies_are_refused(api: Any, body: bytes, param: str | None) -> None:
    for path in (CHAT, COMPLETIONS):
        reply = api.call("POST", path, body)
        assert reply.status == 400, reply.body
        assert reply.error["type"] == "invalid_request_error"
        if path == COMPLETIONS:
            assert reply.error["param"] == param, reply.body
        assert api.engine.submits == []
    api.assert_alive()


HUGE: list[tuple[dict[str, Any], str | None]] = [
    ({"stop": [1] * 300_000}, "stop"),
    ({"messages": [{}] * 240_000}, "messages"),
    ({"messages": [{str(i): 1 for i in range(80)}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{}] * 100_000}]}, "messages[0].content"),
    ({"metadata": {str(i): 1 for i in range(60_000)}}, "metadata"),
    ({"stream_options": {str(i): 1 for i in range(60_000)}}, "stream_options"),
    ({str(i): 1 for i in range(60_000)}, None),
]


@pytest.fixture
def settled_heap() -> Iterator[None]:
    """As in a server that has started: what other tests of this process left is not collected meanwhile."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("settled_heap")
@pytest.mark.parametrize(("fields", "param"), HUGE, ids=short)
def test_row22_a_body_full_of_faults_is_refused_at_the_first(api: Any, fields: dict[str, Any], param: str) -> None:
    """Each of these took up to a second of the event loop when every fault was described."""
    body = json.dumps({"model": "tiny", "messages": [USER]} | fields).encode()
    start = time.thread_time()  # work, not waiting: the machine may be busy with other things
    reply = api.call("POST", CHAT, body)
    assert time.thread_time() - start < 0.25
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert reply.error["code"] == "array_above_max_length"


def test_row13_deep_and_wide_bodies_are_diagnosed_in_bounded_memory(api: Any) -> None:
    body = b'{"a":' + b"[" * 900 + b"1," * 30_000 + b"NaN" + b"]" * 900 + b"}"
    reply = api.call("POST", CHAT, body)
    assert reply.status == 400
    assert len(reply.body) < 2000


def test_an_escaped_backslash_before_u0000_is_no_nul(api: Any) -> None:
    assert api.call("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a\\\\u0000b"}').status == 200


@pytest.mark.parametrize("field", ["user", "model", "stop", "messages", "cache_salt", "temperature", "x" * 500])
def test_row14_a_megabyte_of_a_bad_field_is_not_repeated(api: Any, field: str) -> None:
    reply = api.chat(**{field: "SECRET-" * 140_000})
    assert reply.status in (400, 404)
    assert b"SECRET" not in reply.body
    assert len(reply.body) < 2000
    assert len(reply.error["param"]) <= 64


@pytest.mark.parametrize("name", ["a\nb", "é" * 10, "<script>", "x" * 100_000, "\u2028", "", "0xdeadbeef"])
def test_row14_a_fields_name_is_cleaned_before_it_is_shown(api: Any, name: str) -> None:
    for lenient in (api, api.with_settings(unknown_fields="warn")):
        reply = lenient.chat(**{name: 1})
        shown = reply.headers.get("x-mixtral-serve-warning", "") + reply.body.decode()
        assert shown.isascii()
        assert "<script>" not in shown
        assert len(reply.body) < 2000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "text", "tiny", -1, 0, 1, 2, 16, 17, 512, 2**31, 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAMPLING = ["temperature", "top_p", "top_k", "min_p", "seed", "n", "logprobs", "top_logprobs"]
BOUNDS = ["stop", "stop_token_ids", "max_tokens", "min_tokens", "max_completion_tokens", "ignore_eos"]
OTHERS = ["stream", "stream_options", "priority", "cache_salt", "user", "metadata", "tools", "logit_bias", "echo"]
FIELDS = st.sampled_from([*SAMPLING, *BOUNDS, *OTHERS, "messages", "prompt", "model", "other"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([CHAT, COMPLETIONS]), fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_row16_no_combination_of_fields_is_a_5xx(api: Any, path: str, fields: dict[str, Any]) -> None:
    base: dict[str, Any] = {"model": "tiny"}
    base |= {"messages": [USER]} if path == CHAT else {"prompt": "hello"}
    before = len(api.engine.submits)
    reply = api.call("POST", path, json.dumps(base | fields).encode())
    assert reply.status in (200, 400, 404)
    if reply.status != 200:
        assert reply.error["code"]
        assert len(api.engine.submits) == before
    api.assert_alive()
