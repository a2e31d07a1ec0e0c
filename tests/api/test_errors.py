"""Every route with every kind of failure: always the envelope, never more than the client may know."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from mixtral_serve.api.app import create_app
from mixtral_serve.api.errors import BodyTimeout, describe
from mixtral_serve.engine.errors import EngineUnavailable, RequestRefused
from mixtral_serve.engine.listener import EngineState

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]
GENERATING = {
    CHAT: {"model": "tiny", "messages": MESSAGES},
    "/v1/completions": {"model": "tiny", "prompt": "x"},
    "/v1/responses": {"model": "tiny", "input": "x"},
}
GOOD: dict[str, dict[str, Any]] = {
    **GENERATING,
    "/v1/embeddings": {"model": "tiny", "input": "x"},
    "/tokenize": {"prompt": "x"},
    "/v1/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [5]},
    "/v1/detokenize": {"model": "tiny", "tokens": [5]},
    "/apply-template": {"messages": MESSAGES},
    "/v1/apply-template": {"messages": MESSAGES},
}
CANCEL = "/v1/requests/chatcmpl-1/cancel"
GET_PATHS = [
    "/v1/models",
    "/v1/models/tiny",
    "/v1/requests",
    "/tokenizer_info",
    "/v1/tokenizer_info",
    "/livez",
    "/readyz",
    "/health",
    "/version",
    "/metrics",
    "/memory",
    "/openapi.json",
]
LEAKS = re.compile(rb'0x[0-9a-f]{6,}|File "|/home|/work|Traceback|site-packages')


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """(method, path) of all routes, included routers and all."""
    found = set()
    for path, methods in app.openapi()["paths"].items():
        found |= {(method.upper(), path) for method in methods}
    return found


def test_the_routes_are_those_of_this_list(api: Any) -> None:
    expected = {("POST", path) for path in GOOD} | {("GET", path) for path in GET_PATHS if path != "/v1/models/tiny"}
    named = {("GET", "/v1/models/{model_id}"), ("POST", "/v1/requests/{request_id}/cancel")}
    assert routes(api.app) == expected | named
    assert all(isinstance(route, APIRoute) for route in api.app.routes if hasattr(route, "endpoint"))


@pytest.mark.parametrize("path", [*GOOD, CANCEL, *GET_PATHS])
def test_wrong_methods_are_405_with_the_right_one_named(api: Any, path: str) -> None:
    right = "GET" if path in GET_PATHS else "POST"
    wrong = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"} - {right}
    for method in sorted(wrong):
        assert_not_allowed(api.call(method, path, b"{}"), right)


def assert_not_allowed(reply: Any, right: str) -> None:
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == right


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/docs", "/redoc", "/v1/engines", "/\x00", "x"],
)
def test_unknown_routes_are_404(api: Any, path: str) -> None:
    for method in ("GET", "POST"):
        reply = api.call(method, path, b"{}")
        assert (reply.status, reply.error["code"]) == (404, "unknown_url")


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        (b"{}", {"content-length": "1000001"}, 413, "request_too_large"),
        (b" " * 1_000_001, {}, 413, "request_too_large"),
        (b" " * 1_000_000, {}, 400, "invalid_json"),
        (b"{}", {}, 400, "missing_required_parameter"),
        (b"nonsense", {}, 400, "invalid_json"),
        (b'{"model": "other", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}', {}, 400, None),
    ],
    ids=range(8),
)
def test_bad_bodies_on_every_route(
    api: Any, path: str, body: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    reply = api.call("POST", path, body, headers)
    assert reply.status == status
    assert code in (None, reply.error["code"])
    assert api.engine.submits == []
    api.assert_alive()


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestRefused("no"), 400),
        (EngineUnavailable("dead", 30.0), 503),
        (RuntimeError("at 0x7f00deadbeef"), 500),
        (KeyError("/home/secret"), 500),
    ],
    ids=str,
)
def test_row27_what_the_engine_raises_on_every_route(
    api: Any, path: str, stream: bool, error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    api.engine.refusal = error
    reply = api.call("POST", path, GOOD[path] | {"stream": stream})
    assert reply.status == status
    assert reply.error["code"]
    assert not LEAKS.search(reply.body)
    assert ("retry-after" in reply.headers) == (status == 503)
    assert ("failed" in caplog.text) == (status == 500), "what nobody foresaw is in the log, with its traceback"
    assert reply.headers["x-request-id"].startswith("req_")
    api.engine.refusal = None
    api.assert_alive()


@pytest.mark.parametrize("path", GET_PATHS)
def test_row27_an_unforeseen_error_anywhere_is_a_500_in_the_envelope(api: Any, path: str) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("in /home at 0x7f00deadbeef")

    class BrokenEngine:
        state = is_ready = info = inspect = property(broken)

    deps = replace(api.deps, engine=BrokenEngine(), render_metrics=broken, memory_report=broken)
    reply = type(api)(create_app(deps), api.engine, deps).call("GET", path)
    if path in ("/livez", "/version", "/openapi.json", "/tokenizer_info", "/v1/tokenizer_info"):
        assert reply.status == 200, "they ask nobody"
    else:
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert not LEAKS.search(reply.body)


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_probes_tell_live_from_ready(api: Any, state: EngineState) -> None:
    assert api.call("GET", "/readyz").status == 200
    api.engine.state, api.engine.is_ready = state, False
    assert api.call("GET", "/livez").json() == {"status": "ok"}
    for path in ("/readyz", "/health"):
        reply = api.call("GET", path)
        assert (reply.status, reply.error["code"]) == (503, "server_is_overloaded")
        assert state.value in reply.error["message"]
        assert "retry-after" in reply.headers


def test_row38_a_stalled_engine_is_not_ready(api: Any) -> None:
    api.engine.is_ready = False
    assert "stalled" in api.call("GET", "/readyz").error["message"]


def test_while_the_model_loads_a_good_request_waits_and_a_bad_one_is_told_why(api: Any) -> None:
    api.engine.info, api.engine.state, api.engine.is_ready = None, EngineState.LOADING, False
    reply = api.chat()
    assert (reply.status, reply.error["code"]) == (503, "server_is_overloaded")
    assert "retry-after" in reply.headers
    assert api.chat(n=99).error["param"] == "n"
    assert api.call("GET", "/v1/models/tiny").json()["max_model_len"] is None


def test_models_are_listed_and_found_by_each_name(api: Any) -> None:
    cards = api.call("GET", "/v1/models").json()
    assert cards["object"] == "list"
    assert [card["id"] for card in cards["data"]] == ["tiny", "org/tiny"]
    for card in cards["data"]:
        assert api.call("GET", f"/v1/models/{card['id']}").json() == card
        assert card["max_model_len"] == 512
        assert api.chat(model=card["id"]).json()["model"] == card["id"]
    reply = api.call("GET", "/v1/models/other")
    assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")


def test_row9_request_ids_are_made_here_and_the_clients_are_only_given_back(api: Any, run: Any) -> None:
    async def scenario() -> list[Any]:
        calls = [api.send("POST", CHAT, GOOD[CHAT], {"x-request-id": "same\r\n <id>" + "y" * 100}) for _ in range(100)]
        return await asyncio.gather(*calls)

    replies = run(scenario())
    assert len({reply.headers["x-request-id"] for reply in replies}) == 100
    assert len({reply.json()["id"] for reply in replies}) == 100
    assert len({submit.request_id for submit in api.engine.submits}) == 100
    echoed = {reply.headers["x-client-request-id"] for reply in replies}
    assert echoed == {"sameid" + "y" * (64 - len("same\r\n <id>"))}
    assert "x-client-request-id" not in api.call("GET", "/livez").headers
    assert api.call("GET", "/livez", None, {"x-client-request-id": "abc"}).headers["x-client-request-id"] == "abc"


@pytest.mark.parametrize("path", ["/livez", "/nope", CHAT])
def test_every_answer_carries_the_same_headers(api: Any, path: str) -> None:
    headers = api.call("GET", path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["x-request-id"].startswith("req_")
    assert "server" not in headers


@pytest.mark.parametrize(
    ("error", "status"),
    [(BodyTimeout(), 408), (HTTPException(418), 418), (HTTPException(502), 502), (Exception(), 500)],
)
def test_errors_beyond_the_table_have_the_envelope_too(error: Exception, status: int) -> None:
    problem = describe(error)
    assert problem.status == status
    assert problem.code
