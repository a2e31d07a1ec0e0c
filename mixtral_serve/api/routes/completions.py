"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.completion_format import CompletionFormat
from mixtral_serve.api.convert import Terms, submits_for, truncated
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.formats import Extras
from mixtral_serve.api.generation import Generation, generate
from mixtral_serve.api.intake import Intake
from mixtral_serve.api.schemas.completions import CompletionRequest, screened_completion
from mixtral_serve.api.structured import GrammarMaker
from mixtral_serve.engine.admission import COMPLETION_DEFAULT_MAX_TOKENS
from mixtral_serve.text.bad_words import bad_word_ids


def completion_routes(deps: Dependencies, encoder: PromptEncoder, grammars: GrammarMaker) -> APIRouter:
    """The completions endpoint."""
    router = APIRouter()
    intake = Intake(deps, CompletionRequest, screen=screened_completion)

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        order = await intake.read(request, id_prefix="cmpl", prompt_param="prompt")
        asked = order.request
        texts = [prompt for prompt in asked.prompt if isinstance(prompt, str)]
        is_cut = asked.truncate_prompt_tokens is not None
        encoded = iter(await encoder.texts(texts, order.info, add_bos=asked.add_special_tokens, may_be_too_long=is_cut))
        whole = [next(encoded) if isinstance(prompt, str) else prompt for prompt in asked.prompt]
        terms = Terms(
            default_max_tokens=COMPLETION_DEFAULT_MAX_TOKENS,
            strip_leading_space=False,
            grammar=await grammars.of(asked, after_space=False),
            bad_words=bad_word_ids(deps.tokenizer, asked.bad_words),
        )
        bos = deps.tokenizer.bos_token_id
        prompts = tuple([truncated(asked, prompt, info=order.info, terms=terms, bos=bos) for prompt in whole])
        submits = submits_for(asked, prompts, info=order.info, origin=order.origin, terms=terms)
        skips = asked.skip_special_tokens
        generation = Generation(
            submits=submits,
            prompts=prompts,
            format=CompletionFormat(
                order.head,
                deps.tokenizer.token_bytes,
                Extras.of(asked, prompts),
                logprobs=asked.logprobs,
                echoes=await encoder.decoded(prompts, skip_special_tokens=skips) if asked.echo else None,
                skip_special_tokens=skips,
            ),
            stream=asked.stream,
            include_usage=asked.wants_usage,
            headers=order.headers,
            keep_alive=deps.keep_alive,
            clock=deps.clock,
        )
        return await generate(generation, deps.engine, receive=request.receive)

    return router
