"""Every route with every kind of failure: the right status, the envelope, no echo, and a canary works afterwards."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from fastapi.routing import APIRoute

from mixtral_serve.api.app import create_app
from mixtral_serve.api.openapi import OPERATIONS
from mixtral_serve.engine.errors import EngineUnavailable, MemoryPressure, QueueFull
from mixtral_serve.engine.listener import EngineState

CANARY = "c4n4ry/5ecret"
MESSAGES = [{"role": "user", "content": CANARY}]
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": MESSAGES},
    "/v1/completions": {"model": "tiny", "prompt": CANARY},
    "/v1/responses": {"model": "tiny", "input": CANARY},
}
SUBMITTING = {**GENERATING, "/v1/embeddings": {"model": "tiny", "input": CANARY}}
BODIES: dict[str, dict[str, Any]] = {
    **SUBMITTING,
    "/tokenize": {"model": "tiny", "prompt": CANARY},
    "/v1/tokenize": {"model": "tiny", "messages": MESSAGES},
    "/detokenize": {"model": "tiny", "tokens": [5]},
    "/v1/detokenize": {"model": "tiny", "tokens": [5]},
    "/apply-template": {"model": "tiny", "messages": MESSAGES},
    "/v1/apply-template": {"model": "tiny", "messages": MESSAGES},
}
AUTHENTICATED = [
    "/v1/models",
    "/v1/models/tiny",
    "/v1/requests",
    "/tokenizer_info",
    "/v1/tokenizer_info",
    "/memory",
]
LEAKS = re.compile(rb'0x[0-9a-f]{6,}|File "|/home|Traceback|site-packages')
JSON = {"content-type": "application/json"}


def check(reply: Any, status: int, code: str | None = None) -> None:
    """What holds for every error."""
    assert reply.status == status, reply.body
    assert code in (None, reply.error["code"])
    assert CANARY.encode() not in reply.body
    assert not LEAKS.search(reply.body)
    assert reply.headers["x-request-id"].startswith("req_")
    assert ("retry-after" in reply.headers) == (status in (429, 503))
    if "retry-after" in reply.headers:
        assert int(reply.headers["retry-after"]) >= 1


def variant(api: Any, **changes: Any) -> Any:
    deps = replace(api.deps, **changes)
    return type(api)(create_app(deps), api.engine, deps)


def broken(*_: object) -> Any:
    raise RuntimeError(f"{CANARY} in /home at 0x7f00deadbeef")


def test_this_list_and_the_document_know_all_routes(api: Any) -> None:
    found = {(method, path) for path, methods in api.app.openapi()["paths"].items() for method in methods}
    assert found == {(operation.method, operation.path) for operation in OPERATIONS}
    assert {operation.path for operation in OPERATIONS if operation.body} == set(BODIES)
    assert all(isinstance(route, APIRoute) for route in api.app.routes if hasattr(route, "endpoint"))


@pytest.mark.parametrize("path", BODIES)
def test_bad_bodies(api: Any, path: str) -> None:
    good = BODIES[path]
    body = json.dumps(good).encode()
    for sent, headers, status, code in [
        (body, {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (body, {"content-type": f"application/{CANARY}"}, 415, "unsupported_media_type"),
        (body, {"content-encoding": "br"}, 415, "unsupported_media_type"),
        (body + b" " * 1_000_000, JSON, 413, "request_too_large"),
        (body[:-1], JSON, 400, "invalid_json"),
        (f'"{CANARY}"'.encode(), JSON, 400, "invalid_type"),
        (f'["{CANARY}"]'.encode(), JSON, 400, "invalid_type"),
        (b"null", JSON, 400, "invalid_type"),
        (b"{}", JSON, 400, "missing_required_parameter"),
        (json.dumps(good | {"colour": CANARY}).encode(), JSON, 400, "unknown_parameter"),
        (json.dumps(good | {"model": CANARY}).encode(), JSON, 404, "model_not_found"),
    ]:
        check(api.call("POST", path, sent, headers), status, code)
    for name in good:
        for wrong in ({CANARY: CANARY}, [{CANARY: CANARY}], 1.5, True):
            check(api.call("POST", path, good | {name: wrong}), 400)
    assert api.engine.submits == []
    assert api.call("POST", path, good).status == 200


@pytest.mark.parametrize("path", BODIES)
def test_wrong_methods(api: Any, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        check(api.call(method, path, BODIES[path]), 405, "method_not_allowed")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"authenticate": broken}, 500, "internal_error"),
        ({"check_memory": broken}, 500, "internal_error"),
        ({"clock": broken}, 500, "internal_error"),
    ],
    ids=lambda value: str(value)[:16] if isinstance(value, dict) else None,
)
def test_an_exception_that_nobody_foresaw(api: Any, path: str, changes: dict[str, Any], status: int, code: str) -> None:
    check(variant(api, **changes).call("POST", path, BODIES[path]), status, code)
    assert api.call("POST", path, BODIES[path]).status == 200


@pytest.mark.parametrize("path", BODIES)
def test_while_memory_is_short_or_the_model_loads(api: Any, path: str) -> None:
    def short() -> None:
        raise MemoryPressure

    check(variant(api, check_memory=short).call("POST", path, BODIES[path]), 503, "memory_pressure")
    info = api.engine.info
    api.engine.info, api.engine.state = None, EngineState.LOADING
    check(api.call("POST", path, BODIES[path]), 503, "server_is_overloaded")
    api.engine.info, api.engine.state = info, EngineState.READY
    assert api.call("POST", path, BODIES[path]).status == 200


@pytest.mark.parametrize("path", SUBMITTING)
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull(5, 7.2), 429, "rate_limit_exceeded"),
        (MemoryPressure(), 503, "memory_pressure"),
        (EngineUnavailable("dead", 30.0), 503, "server_is_overloaded"),
        (RuntimeError(f"{CANARY} at 0x7f00deadbeef"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_engine_raises(api: Any, path: str, error: Exception, status: int, code: str) -> None:
    api.engine.refusal = error
    check(api.call("POST", path, BODIES[path]), status, code)
    if path in GENERATING:
        check(api.call("POST", path, BODIES[path] | {"stream": True}), status, code)
    api.engine.refusal = None
    assert api.call("POST", path, BODIES[path]).status == 200


ENDINGS = {"error": (500, "generation_failed"), "deadline": (503, "interrupted"), "cancelled": (503, "interrupted")}


@pytest.mark.parametrize("path", SUBMITTING)
@pytest.mark.parametrize("reason", ENDINGS)
def test_an_engine_that_fails_midway(api: Any, run: Any, path: str, reason: str) -> None:
    api.engine.answer = api.engine.embedding = None

    async def scenario(said: str, *, stream: bool) -> Any:
        api.engine.on_submit = asyncio.Event()
        body = BODIES[path] | ({"stream": True} if stream else {})
        asked = asyncio.create_task(api.send("POST", path, body))
        await api.engine.on_submit.wait()
        request_id = api.engine.last.request_id
        api.engine.say(request_id, said, reason=None)
        api.engine.end(request_id, reason, error=f"{CANARY} at /home")
        return await asked

    check(run(scenario("", stream=False)), *ENDINGS[reason])
    if path in GENERATING:
        check(run(scenario("", stream=True)), *ENDINGS[reason])
        reply = run(scenario("ab", stream=True))
        assert reply.status == 200
        assert CANARY.encode() not in reply.body
        last = json.loads(reply.body.decode().rstrip("\n").split("\n")[-1].removeprefix("data: "))
        told = last["response"]["error"]["code"] if "response" in last else last["error"]["code"]
        assert told == ("server_error" if "response" in last else ENDINGS[reason][1])


@pytest.mark.parametrize("path", AUTHENTICATED)
def test_without_a_body_too_nobody_unforeseen_is_answered(api: Any, path: str) -> None:
    check(variant(api, authenticate=broken).call("GET", path), 500, "internal_error")
    assert api.call("GET", path).status == 200


def test_names_in_paths_are_not_repeated(api: Any) -> None:
    check(api.call("GET", f"/v1/models/{CANARY}"), 404, "model_not_found")
    check(api.call("POST", "/v1/requests/c4n4ry/cancel"), 404, "request_not_found")
    check(variant(api, authenticate=broken).call("POST", "/v1/requests/x/cancel"), 500, "internal_error")
    for method in ("GET", "POST", "PUT"):
        check(api.call(method, f"/{CANARY}"), 404, "unknown_url")
