"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.convert import submits_for
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.formats import CompletionFormat
from mixtral_serve.api.generation import Generation, generate
from mixtral_serve.api.intake import Intake
from mixtral_serve.api.schemas.completions import CompletionRequest, screened_completion
from mixtral_serve.engine.admission import COMPLETION_DEFAULT_MAX_TOKENS


def completion_routes(deps: Dependencies, encoder: PromptEncoder) -> APIRouter:
    """The completions endpoint."""
    router = APIRouter()
    intake = Intake(deps, CompletionRequest, screen=screened_completion)

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        order = await intake.read(request, id_prefix="cmpl", prompt_param="prompt")
        asked = order.request
        texts = [prompt for prompt in asked.prompt if isinstance(prompt, str)]
        encoded = iter(await encoder.texts(texts, order.info))
        prompts = tuple([next(encoded) if isinstance(prompt, str) else prompt for prompt in asked.prompt])
        submits = submits_for(
            asked,
            prompts,
            info=order.info,
            origin=order.origin,
            default_max_tokens=COMPLETION_DEFAULT_MAX_TOKENS,
            strip_leading_space=False,
        )
        generation = Generation(
            submits=submits,
            prompts=prompts,
            format=CompletionFormat(order.head, deps.tokenizer.token_bytes, include_usage=order.include_usage),
            stream=asked.stream,
            include_usage=order.include_usage,
            headers=order.headers,
        )
        return await generate(generation, deps.engine, receive=request.receive)

    return router
