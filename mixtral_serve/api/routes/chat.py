"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.convert import Terms, submits_for, truncated
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.formats import ChatFormat, Extras
from mixtral_serve.api.generation import Generation, generate
from mixtral_serve.api.intake import Intake
from mixtral_serve.api.schemas.chat import ChatRequest, screened_chat
from mixtral_serve.api.structured import GrammarMaker
from mixtral_serve.api.tools import ToolSpeech, ToolUse
from mixtral_serve.text.bad_words import bad_word_ids


def chat_routes(deps: Dependencies, encoder: PromptEncoder, grammars: GrammarMaker) -> APIRouter:
    """The chat endpoint."""
    router = APIRouter()
    intake = Intake(deps, ChatRequest, screen=screened_chat)

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        order = await intake.read(request, id_prefix="chatcmpl", prompt_param="messages")
        asked = order.request
        is_cut = asked.truncate_prompt_tokens is not None
        use = ToolUse.of(asked)
        is_new_message = not asked.continue_final_message
        if use is None:
            grammar = await grammars.of(asked, after_space=is_new_message)
        else:
            grammar = await grammars.checked(use.grammar, param="tools")
        whole = await encoder.chat(asked.conversation(), order.info, how=asked.rendering(), may_be_too_long=is_cut)
        terms = Terms(
            default_max_tokens=None,
            # What continues a message may well begin with a space.
            strip_leading_space=is_new_message,
            grammar=grammar,
            bad_words=bad_word_ids(deps.tokenizer, asked.bad_words),
        )
        prompts = (truncated(asked, whole, info=order.info, terms=terms, bos=deps.tokenizer.bos_token_id),)
        submits = submits_for(asked, prompts, info=order.info, origin=order.origin, terms=terms)
        tier = {} if asked.service_tier is None else {"service_tier": "default"}
        generation = Generation(
            submits=submits,
            prompts=prompts,
            format=ChatFormat(
                order.head,
                deps.tokenizer.token_bytes,
                Extras.of(asked, prompts, fields=tier, metadata=asked.metadata),
                None if use is None else ToolSpeech(use),
            ),
            stream=asked.stream,
            include_usage=asked.wants_usage,
            headers=order.headers,
            keep_alive=deps.keep_alive,
            clock=deps.clock,
        )
        return await generate(generation, deps.engine, receive=request.receive)

    return router
