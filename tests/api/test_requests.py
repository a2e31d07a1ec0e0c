"""The table of requests and the cancellation by id: true, bounded, and within one's own tenant."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.api.app import create_app
from mixtral_serve.api.auth import Caller
from mixtral_serve.api.live import TrackedEngine
from mixtral_serve.engine.errors import EngineUnavailable
from mixtral_serve.engine.inspection import RequestTable
from mixtral_serve.engine.messages import Submit
from scheduler.census import Blocking, Census, CensusEntry
from scheduler.lifecycle import RequestStatus
from scheduler.request import RequestId, RequestKind

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}

RUNNING = CensusEntry(
    id=RequestId("chatcmpl-abc-1"),
    status=RequestStatus.RUNNING,
    kind=RequestKind.GENERATE,
    tenant="",
    priority=2,
    arrival_s=90.0,
    num_prompt_tokens=7,
    num_computed_tokens=8,
    num_output_tokens=2,
    max_tokens=50,
    num_preemptions=1,
    blocking=None,
    num_ahead=None,
    num_tokens_ahead=None,
)


def by_header(headers: Mapping[str, str]) -> Caller:
    return Caller(tenant=headers.get("x-tenant", ""))


def with_deps(api: Any, **changes: Any) -> Any:
    deps = replace(api.deps, **changes)
    return type(api)(create_app(deps), api.engine, deps)


def test_the_table_says_who_runs_who_waits_and_for_what(api: Any) -> None:
    waiting = replace(
        RUNNING,
        id=RequestId("embd-xyz-0"),
        kind=RequestKind.EMBED,
        status=RequestStatus.WAITING,
        blocking=Blocking.SEATS,
        num_ahead=4,
        num_tokens_ahead=9,
    )
    api.engine.table = RequestTable(Census("", (RUNNING, waiting), 1, 8, 0), (0.0, 12.3456))
    answer = with_deps(api, clock=lambda: 100.0).call("GET", "/v1/requests").json()
    first, second = answer.pop("data")
    assert answer == {"object": "list", "running": 1, "waiting": 8, "preempted": 0, "has_more": True}
    assert first == {
        "id": "chatcmpl-abc",
        "object": "request",
        "choice": 1,
        "kind": "generate",
        "status": "running",
        "priority": 2,
        "age_s": 10.0,
        "prompt_tokens": 7,
        "computed_tokens": 8,
        "completion_tokens": 2,
        "max_tokens": 50,
        "preemptions": 1,
        "blocking_reason": None,
        "requests_ahead": None,
        "estimated_wait_s": 0.0,
    }
    told = (second["id"], second["kind"], second["status"], second["blocking_reason"], second["requests_ahead"])
    assert told == ("embd-xyz", "embed", "waiting", "seats", 4)
    assert second["estimated_wait_s"] == 12.346


def test_a_wait_that_nobody_knows_is_null_and_a_whole_table_has_no_more(api: Any) -> None:
    waiting = replace(RUNNING, status=RequestStatus.WAITING, blocking=Blocking.PREFIX)
    api.engine.table = RequestTable(Census("", (waiting,), 0, 1, 0), (None,))
    answer = api.call("GET", "/v1/requests").json()
    assert (answer["data"][0]["estimated_wait_s"], answer["has_more"]) == (None, False)


def test_without_an_engine_there_is_no_table(api: Any) -> None:
    api.engine.refusal = EngineUnavailable("dead", 30.0)
    reply = api.call("GET", "/v1/requests")
    assert (reply.status, reply.headers["retry-after"]) == (503, "30")


def test_a_cancelled_answer_ends_with_an_error_and_all_its_choices_end(api: Any, run: Any) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        asked = asyncio.create_task(api.send("POST", CHAT, BODY | {"n": 3}))
        await api.engine.on_submit.wait()
        answer_id = api.engine.last.request_id.rpartition("-")[0]
        reply = await api.send("POST", f"/v1/requests/{answer_id}/cancel")
        assert (reply.status, reply.json()) == (
            200,
            {"id": answer_id, "object": "request.cancelled", "cancelled_choices": 3},
        )
        assert api.engine.cancelled == [submit.request_id for submit in api.engine.submits]
        for submit in api.engine.submits:
            api.engine.end(submit.request_id, "cancelled")
        told = await asked
        assert (told.status, told.error["code"]) == (400, "request_cancelled")
        again = await api.send("POST", f"/v1/requests/{answer_id}/cancel")
        assert (again.status, again.error["code"]) == (404, "request_not_found")

    run(scenario())


def test_a_cancelled_stream_ends_with_an_error_event(api: Any, run: Any, start_exchange: Any) -> None:
    api.engine.answer = None

    async def scenario() -> None:
        call = start_exchange(api.app, "POST", CHAT, json.dumps(BODY | {"stream": True}).encode())
        task = call.start()
        await api.engine.on_submit.wait()
        request_id = api.engine.last.request_id
        api.engine.say(request_id, "ab", reason=None)
        await call.on_send.wait()
        assert (await api.send("POST", f"/v1/requests/{request_id.rpartition('-')[0]}/cancel")).status == 200
        api.engine.end(request_id, "cancelled")
        await task
        events = call.reply().events
        assert events[-1]["error"]["code"] == "request_cancelled"
        assert "".join(event["choices"][0]["delta"]["content"] for event in events[1:-1]) == "ab"

    run(scenario())


@pytest.mark.parametrize("request_id", ["chatcmpl-1", "x", "%2e%2e", "a" * 3000, "caf%C3%A9"])
def test_unknown_ids_are_not_found_and_not_repeated(api: Any, request_id: str) -> None:
    reply = api.call("POST", f"/v1/requests/{request_id}/cancel")
    assert (reply.status, reply.error["code"]) == (404, "request_not_found")
    assert request_id not in reply.body.decode() or request_id == "x"


def test_an_answer_that_has_ended_cannot_be_cancelled(api: Any) -> None:
    answer_id = api.chat().json()["id"]
    assert api.call("POST", f"/v1/requests/{answer_id}/cancel").status == 404


def test_to_other_tenants_an_answer_does_not_exist(api: Any, run: Any) -> None:
    api.engine.answer = None
    api = with_deps(api, authenticate=by_header)

    async def scenario() -> None:
        asked = asyncio.create_task(api.send("POST", CHAT, BODY, {"x-tenant": "a"}))
        await api.engine.on_submit.wait()
        path = f"/v1/requests/{api.engine.last.request_id.rpartition('-')[0]}/cancel"
        assert (await api.send("POST", path, None, {"x-tenant": "b"})).status == 404
        assert api.engine.cancelled == []
        assert (await api.send("GET", "/v1/requests", None, {"x-tenant": "b"})).status == 200
        assert (await api.send("POST", path, None, {"x-tenant": "a"})).status == 200
        api.engine.end(api.engine.last.request_id, "cancelled")
        await asked

    run(scenario())


def test_answers_that_have_ended_are_forgotten(api: Any, run: Any) -> None:
    async def scenario() -> None:
        tracked = TrackedEngine(api.engine)
        for number in range(1000):
            tracked.submit([Submit(request_id=f"a{number}-0", prompt=b"\5\0\0\0", arrival_s=0.0, max_tokens=1)])
        assert tracked.num_kept <= 65
        api.engine.answer = None
        for number in range(100):
            tracked.submit([Submit(request_id=f"b{number}-0", prompt=b"\5\0\0\0", arrival_s=0.0, max_tokens=1)])
        assert all(tracked.cancel(f"b{number}", tenant="") == 1 for number in range(100))

    run(scenario())
