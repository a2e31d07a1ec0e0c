"""The application: routes, error handlers and middleware put together.

Owns: ``create_app``. No state of its own and no module-level app: everything comes in as ``Dependencies``.
"""

from __future__ import annotations

from dataclasses import replace

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.errors import ApiError, InvalidRequest, describe
from mixtral_serve.api.live import TrackedEngine
from mixtral_serve.api.middleware import BodyLimits, Envelope
from mixtral_serve.api.responses import problem_response
from mixtral_serve.api.routes.chat import chat_routes
from mixtral_serve.api.routes.completions import completion_routes
from mixtral_serve.api.routes.embeddings import embedding_routes
from mixtral_serve.api.routes.health import health_routes
from mixtral_serve.api.routes.memory import memory_routes
from mixtral_serve.api.routes.models import model_routes
from mixtral_serve.api.routes.requests import request_routes
from mixtral_serve.api.routes.responses import response_routes
from mixtral_serve.api.routes.tokens import token_routes
from mixtral_serve.api.structured import GrammarMaker
from mixtral_serve.engine.errors import EngineError
from mixtral_serve.text.errors import ChatTemplateError


def create_app(deps: Dependencies) -> FastAPI:
    """The ASGI application over ``deps``."""
    app = FastAPI(
        title="mixtral-serve",
        version=deps.version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would be built from the Host header
        middleware=[
            Middleware(Envelope),
            Middleware(BodyLimits, max_bytes=deps.settings.max_body_bytes, timeout_s=deps.settings.body_timeout_s),
        ],
    )
    engine = TrackedEngine(deps.engine)
    deps = replace(deps, engine=engine)
    encoder = PromptEncoder(deps.tokenizer, deps.chat_template)
    grammars = GrammarMaker(deps.tokenizer)
    for router in (
        chat_routes(deps, encoder, grammars),
        completion_routes(deps, encoder, grammars),
        response_routes(deps, encoder, grammars),
        embedding_routes(deps, encoder),
        token_routes(deps, encoder),
        request_routes(deps, engine),
        model_routes(deps),
        health_routes(deps),
        memory_routes(deps),
    ):
        app.include_router(router)
    for kind in (ApiError, EngineError, ChatTemplateError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    del request
    return problem_response(describe(error))


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A path or query parameter of the wrong form. The framework's own handler repeats the input."""
    del request, error
    return problem_response(describe(InvalidRequest("A parameter is not valid.", param=None, code="invalid_value")))
