"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.convert import submits_for
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.formats import ChatFormat
from mixtral_serve.api.generation import Generation, generate
from mixtral_serve.api.intake import Intake
from mixtral_serve.api.schemas.chat import ChatRequest, screened_chat


def chat_routes(deps: Dependencies, encoder: PromptEncoder) -> APIRouter:
    """The chat endpoint."""
    router = APIRouter()
    intake = Intake(deps, ChatRequest, screen=screened_chat)

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        order = await intake.read(request, id_prefix="chatcmpl", prompt_param="messages")
        asked = order.request
        prompts = (await encoder.chat(asked.conversation(), order.info),)
        submits = submits_for(
            asked,
            prompts,
            info=order.info,
            origin=order.origin,
            default_max_tokens=None,
            strip_leading_space=True,
        )
        generation = Generation(
            submits=submits,
            prompts=prompts,
            format=ChatFormat(order.head, deps.tokenizer.token_bytes, include_usage=order.include_usage),
            stream=asked.stream,
            include_usage=order.include_usage,
            headers=order.headers,
        )
        return await generate(generation, deps.engine, receive=request.receive)

    return router
