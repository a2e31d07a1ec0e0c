"""``GET /memory``: what was planned, what is measured, and whether memory is short."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.responses import JsonResponse


def memory_routes(deps: Dependencies) -> APIRouter:
    """The memory report, for whoever may use the API."""
    router = APIRouter()

    @router.get("/memory")
    async def memory(request: Request) -> Response:
        deps.authenticate(request.headers)
        return JsonResponse(deps.memory_report())

    return router
