"""``GET /memory``, and what a client hears when memory is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.api.app import create_app
from mixtral_serve.api.auth import Caller
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.engine.errors import MemoryPressure


def changed(api: Any, **changes: Any) -> Any:
    """The same API over other dependencies."""
    deps = replace(api.deps, **changes)
    return replace(api, app=create_app(deps), deps=deps)


def test_memory_answers_with_the_report(api: Any) -> None:
    report = {"cap_bytes": 90_000_000_000, "parts": {"weights": {"planned_bytes": 1, "measured_bytes": None}}}
    reply = changed(api, memory_report=lambda: report).call("GET", "/memory")
    assert (reply.status, reply.json()) == (200, report)


def test_memory_is_told_to_callers_only(api: Any) -> None:
    def nobody(headers: Mapping[str, str]) -> Caller:
        raise InvalidRequest(f"not with {len(headers)} headers", param=None, code="nobody")

    reply = changed(api, authenticate=nobody, memory_report=lambda: {"secret": 1}).call("GET", "/memory")
    assert (reply.status, reply.error["code"]) == (400, "nobody")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_row53_short_memory_is_503_with_retry_after_and_before_the_body_is_looked_at(api: Any, path: str) -> None:
    def short() -> None:
        raise MemoryPressure(7.0)

    reply = changed(api, check_memory=short).call("POST", path, b"not even JSON")
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "memory_pressure", "7")
    assert "short of memory" in reply.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_row53_an_engine_that_is_short_of_memory_gives_the_same_answer(api: Any, stream: bool) -> None:
    api.engine.refusal = MemoryPressure()
    reply = api.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (503, "memory_pressure")
    assert int(reply.headers["retry-after"]) > 0
    api.engine.refusal = None
    api.assert_alive()
