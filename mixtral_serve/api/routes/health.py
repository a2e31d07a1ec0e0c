"""Probes and facts: ``/livez``, ``/readyz``, ``/health``, ``/version``, ``/metrics``, ``/openapi.json``.

``/livez`` says that the event loop turns, and nothing else: a long step or a dead engine is no reason to restart
this process, which restarts the engine itself. ``/readyz`` (and ``/health``, its older name) says whether requests
are taken now.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from starlette.responses import Response

from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.openapi import openapi_document
from mixtral_serve.api.responses import JsonResponse
from mixtral_serve.engine.errors import EngineUnavailable
from mixtral_serve.engine.listener import EngineState

_PROBE_RETRY_AFTER_S: Final = 5.0
METRICS_MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def health_routes(deps: Dependencies) -> APIRouter:
    """The probes. They answer without a key."""
    router = APIRouter()
    document = JsonResponse(openapi_document(deps.version))

    @router.get("/livez")
    async def livez() -> Response:
        return JsonResponse({"status": "ok"})

    @router.get("/readyz")
    @router.get("/health")
    async def readyz() -> Response:
        engine = deps.engine
        if not engine.is_ready:
            reason = "stalled" if engine.state is EngineState.READY else engine.state.value
            raise EngineUnavailable(reason, _PROBE_RETRY_AFTER_S)
        return JsonResponse({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": deps.version})

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return document

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(deps.render_metrics(), headers={"content-type": METRICS_MEDIA_TYPE})

    return router
