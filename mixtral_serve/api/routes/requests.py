"""``GET /v1/requests`` and ``POST /v1/requests/{id}/cancel``: what is under way, and how to end it from outside.

The table is the engine's own, as of its next tick: who runs, who waits, for what, how many go before, and how long
that takes by what was measured of late (null where nothing tells). A caller sees and cancels its own tenant's
requests only; the id is that of the answer, and ends all its choices.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.errors import RequestNotFound
from mixtral_serve.api.live import TrackedEngine, answer_id, choice_index
from mixtral_serve.api.responses import JsonResponse
from mixtral_serve.engine.inspection import RequestTable
from scheduler.census import CensusEntry


def request_routes(deps: Dependencies, engine: TrackedEngine) -> APIRouter:
    """The table of requests, and the cancellation by id."""
    router = APIRouter()

    @router.get("/v1/requests")
    async def list_requests(request: Request) -> Response:
        caller = deps.authenticate(request.headers)
        table = await engine.inspect(caller.tenant)
        return JsonResponse(_answer(table, now=deps.clock()))

    @router.post("/v1/requests/{request_id}/cancel")
    async def cancel_request(request: Request, request_id: str) -> Response:
        caller = deps.authenticate(request.headers)
        num_cancelled = engine.cancel(request_id, tenant=caller.tenant)
        if not num_cancelled:
            raise RequestNotFound("No request that is under way has this id. GET /v1/requests lists those that live.")
        return JsonResponse({"id": request_id, "object": "request.cancelled", "cancelled_choices": num_cancelled})

    return router


def _answer(table: RequestTable, *, now: float) -> dict[str, object]:
    census = table.census
    num_all = census.num_running + census.num_waiting + census.num_preempted
    return {
        "object": "list",
        "data": [
            _row(entry, wait_s, now=now) for entry, wait_s in zip(census.entries, table.estimated_wait_s, strict=True)
        ],
        "running": census.num_running,
        "waiting": census.num_waiting,
        "preempted": census.num_preempted,
        "has_more": num_all > len(census.entries),
    }


def _row(entry: CensusEntry, wait_s: float | None, *, now: float) -> dict[str, object]:
    return {
        "id": answer_id(entry.id),
        "object": "request",
        "choice": choice_index(entry.id),
        "kind": entry.kind.value,
        "status": entry.status.value,
        "priority": entry.priority,
        "age_s": round(max(0.0, now - entry.arrival_s), 3),
        "prompt_tokens": entry.num_prompt_tokens,
        "computed_tokens": entry.num_computed_tokens,
        "completion_tokens": entry.num_output_tokens,
        "max_tokens": entry.max_tokens,
        "preemptions": entry.num_preemptions,
        "blocking_reason": None if entry.blocking is None else entry.blocking.value,
        "requests_ahead": entry.num_ahead,
        "estimated_wait_s": None if wait_s is None else round(wait_s, 3),
    }
