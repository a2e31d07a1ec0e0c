"""``POST /v1/responses``: OpenAI's newer form of a chat, without storage.

The conversation goes the way of a chat completion (``response_input``, ``conversations``), the answer is told in this
endpoint's own events (``response_format``).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.convert import Terms, finish_reason, submits_for
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.intake import Intake
from mixtral_serve.api.logprobs import TokenNames
from mixtral_serve.api.response_format import ResponseFacts, ResponseWriter
from mixtral_serve.api.response_input import chat_of, in_own_words
from mixtral_serve.api.responses import JsonResponse, until_disconnect
from mixtral_serve.api.schemas.responses import ResponsesRequest, screened_responses, sent_place
from mixtral_serve.api.sse import EventStream
from mixtral_serve.api.structured import GrammarMaker
from mixtral_serve.api.tools import ToolUse
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.text.bad_words import bad_word_ids
from mixtral_serve.text.errors import ChatTemplateError

_LABELS: Final = ("user", "safety_identifier", "prompt_cache_key")


def response_routes(deps: Dependencies, encoder: PromptEncoder, grammars: GrammarMaker) -> APIRouter:
    """The responses endpoint."""
    router = APIRouter()
    intake = Intake(deps, ResponsesRequest, screen=screened_responses, located=sent_place)

    @router.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        order = await intake.read(request, id_prefix="resp", prompt_param="input")
        asked = order.request
        chat = chat_of(asked, deps)
        use = ToolUse.of(chat)
        try:
            if use is None:
                grammar = await grammars.of(chat, after_space=True)
            else:
                grammar = await grammars.checked(use.grammar, param="tools")
            ids = await encoder.chat(chat.conversation(), order.info, how=chat.rendering())
        except InvalidRequest as error:
            raise in_own_words(error) from None
        except ChatTemplateError as error:
            raise InvalidRequest(f"'input': {error}.", param="input", code="invalid_value") from None
        terms = Terms(
            default_max_tokens=None,
            strip_leading_space=True,
            grammar=grammar,
            bad_words=bad_word_ids(deps.tokenizer, asked.bad_words),
        )
        submits = submits_for(asked, (ids,), info=order.info, origin=order.origin, terms=terms)
        facts = ResponseFacts(
            id=order.head.id,
            created_at=order.head.created,
            fields=_repeated(asked),
            num_prompt_tokens=len(ids),
            has_logprobs=asked.num_logprobs() is not None,
            offers_tools=use is not None,
            may_be_text=use is None or use.text_allowed,
        )
        writer = ResponseWriter(facts, TokenNames(deps.tokenizer.token_bytes))
        (stream,) = deps.engine.submit(submits)
        if asked.stream:
            return EventStream(
                _events(writer, stream, deps),
                on_close=stream.cancel,
                headers=order.headers,
                keep_alive=deps.keep_alive,
                to_event=writer.failed,
            )
        try:
            await until_disconnect(request.receive, _collected(writer, stream, deps))
        finally:
            stream.cancel()
        return JsonResponse(writer.response(now=int(deps.wall_clock())), headers=order.headers)

    return router


async def _events(writer: ResponseWriter, stream: TokenStream, deps: Dependencies) -> AsyncGenerator[bytes, None]:
    async for delta in stream:
        finish_reason(delta)  # raises where the server ended the request
        yield writer.push(delta, now=int(deps.wall_clock()))


async def _collected(writer: ResponseWriter, stream: TokenStream, deps: Dependencies) -> None:
    async with aclosing(_events(writer, stream, deps)) as events:
        async for _ in events:
            pass


def _repeated(asked: ResponsesRequest) -> dict[str, object]:
    """The parameters that a response repeats, those that are always the same here included."""
    text_format = asked.text_format.model_dump(by_alias=True, exclude_none=True)
    return {
        "model": asked.model,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_logprobs": asked.top_logprobs or 0,
        "text": {"format": text_format, "verbosity": "medium"},
        "tools": [{"parameters": None} | tool.model_dump(exclude_none=True) for tool in asked.tools],
        "tool_choice": asked.tool_choice,
        "parallel_tool_calls": asked.parallel_tool_calls,
        "metadata": dict(asked.metadata),
        **{name: getattr(asked, name) for name in _LABELS},
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "background": False,
        "previous_response_id": None,
        "max_tool_calls": None,
        "truncation": "disabled",
    }
