"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.intake import require_model
from mixtral_serve.api.responses import JsonResponse
from mixtral_serve.engine.admission import limit_for


def model_routes(deps: Dependencies) -> APIRouter:
    """What is served, under each of its names."""
    router = APIRouter()
    created = int(deps.wall_clock())

    def card(name: str) -> dict[str, object]:
        info = deps.engine.info
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "mixtral-serve",
            "root": deps.model_names[0],
            "parent": None,
            "max_model_len": None if info is None else limit_for(info),
        }

    @router.get("/v1/models")
    async def list_models(request: Request) -> Response:
        deps.authenticate(request.headers)
        return JsonResponse({"object": "list", "data": [card(name) for name in deps.model_names]})

    # A path, because names such as "mistralai/Mixtral-8x7B-Instruct-v0.1" have a slash in them.
    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(request: Request, model_id: str) -> Response:
        deps.authenticate(request.headers)
        require_model(model_id, deps)
        return JsonResponse(card(model_id))

    return router
