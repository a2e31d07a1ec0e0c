"""What users of other servers complain of, and what they meet here instead.

``docs/compatibility.md`` is the list, with the test that proves each line. Most are elsewhere, where they belong; here
are those that no other file states, and the check that the page names tests that there are.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from mixtral_serve.api.auth import Caller
from mixtral_serve.api.openapi import OPERATIONS
from mixtral_serve.text.chat_format import AUTO, MIXTRAL, load_chat_format

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
FUNCTION = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = '[{"name": "now", "arguments": {}}]'
WRONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"},
    "/v1/completions": {"model": "tiny", "prompt": "x", "n": 0},
    "/v1/responses": {"model": "tiny", "input": "x", "top_p": 2},
    "/v1/embeddings": {"model": "tiny", "input": []},
    "/tokenize": {"prompt": 5},
    "/detokenize": {"tokens": "x"},
    "/apply-template": {"messages": []},
}
OPEN = {"/livez", "/readyz", "/health", "/version", "/metrics", "/openapi.json"}
"""Paths that answer everybody: they tell nothing of anybody's requests."""


def test_the_page_names_tests_that_there_are() -> None:
    text = PAGE.read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| Others", "|--")):
            assert "`tests/" in line or "not there yet" in line or "measured" in line, (
                "each line says where it is proven"
            )


@pytest.mark.parametrize("choice", [AUTO, MIXTRAL])
@pytest.mark.parametrize(
    "roles", ["su", "uu", "ssu", "usu", "auu", "suua", "uaau", "su uu s"], ids=lambda roles: roles.replace(" ", "_")
)
def test_a_system_message_and_roles_in_any_order_are_answered(
    api: Any, checkpoint: Path, choice: str, roles: str
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    template = load_chat_format(checkpoint, api.deps.tokenizer, choice=choice)
    variant = api.with_deps(chat_template=template)
    messages = [{"role": names[role], "content": f"word{i}"} for i, role in enumerate(roles.replace(" ", ""))]
    reply = variant.chat(messages=messages)
    assert reply.status == 200, reply.body
    rendered = variant.call("POST", "/apply-template", {"messages": messages}).json()["prompt"]
    for i in range(len(messages)):
        assert rendered.count(f"word{i}") == 1, "repaired by joining: no message is lost, none is said twice"


@pytest.mark.parametrize("path", WRONG)
def test_a_bad_value_is_400_and_never_422_or_500(api: Any, path: str) -> None:
    reply = api.call("POST", path, WRONG[path])
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert not reply.error["code"].isdigit()


def nobody(headers: Mapping[str, str]) -> Caller:
    """Who guards a server refuses like this: by an exception, which becomes the one envelope."""
    del headers
    raise HTTPException(401)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.method}-{each.path}")
def test_no_route_computes_or_tells_anything_before_it_knows_who_asks(api: Any, operation: Any) -> None:
    guarded = api.with_deps(authenticate=nobody)
    body = json.dumps(WRONG.get(operation.path, {})).encode()
    reply = guarded.call(operation.method.upper(), re.sub(r"\{\w+\}", "tiny", operation.path), body)
    if operation.path in OPEN:
        assert reply.status == 200
    else:
        assert reply.status == 401
        assert reply.error["type"] == "invalid_request_error"
    assert api.engine.submits == []


def test_probes_compute_nothing(api: Any) -> None:
    for path in sorted(OPEN):
        assert api.call("GET", path).status == 200
    assert api.engine.submits == []


def test_streamed_calls_have_log_probabilities_where_asked(api: Any) -> None:
    api.engine.answer = CALL
    events = api.chat(tools=TOOLS, stream=True, logprobs=True, top_logprobs=2).events
    told = [choice["logprobs"] for event in events[:-1] for choice in event["choices"] if choice.get("logprobs")]
    assert sum(len(each["content"]) for each in told) == len(CALL)
    assert all(len(token["top_logprobs"]) == 2 for each in told for token in each["content"])


def test_a_penalty_is_not_turned_into_another(api: Any) -> None:
    assert api.chat(frequency_penalty=1.5, presence_penalty=-1.0).status == 200
    sampling = api.engine.last.sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1.5, -1.0, 1.0)


def test_more_tokens_than_the_context_leaves_are_refused_and_not_cut_in_silence(api: Any) -> None:
    reply = api.chat(max_tokens=511)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert "512" in reply.error["message"], "the limit is told"


def test_what_others_serve_without_a_key_is_not_there(api: Any) -> None:
    for path in ("/invocations", "/generate", "/completion", "/inference/v1/generate", "/v1/files", "/v1/batches"):
        for method in ("GET", "POST"):
            assert api.call(method, path, {"prompt": "x"}).error["code"] == "unknown_url"
