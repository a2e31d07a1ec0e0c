"""``/tokenize``, ``/detokenize``, ``/apply-template`` and ``/tokenizer_info``, also under ``/v1``: vLLM's forms.

They cost no step of the model, so no length is refused but that of the body; long texts are encoded beside the event
loop. A conversation is encoded exactly as the chat endpoint encodes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.conversations import conversation_ids
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.intake import warning_headers
from mixtral_serve.api.reading import read_fields, received
from mixtral_serve.api.responses import JsonResponse
from mixtral_serve.api.schemas.refused import Refused
from mixtral_serve.api.schemas.tokens import (
    CONVERSATION_FIELDS,
    TOKENIZE_UNSUPPORTED,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.admission import limit_for

_CHAT_ONLY: Final[Mapping[str, Refused]] = {
    **TOKENIZE_UNSUPPORTED,
    "add_special_tokens": Refused("the chat template writes them", (False,)),
}


def token_routes(deps: Dependencies, encoder: PromptEncoder) -> APIRouter:
    """What turns texts into tokens and back."""
    router = APIRouter()

    async def counted(ids: array[int], info: ModelInfo, *, with_texts: bool) -> dict[str, object]:
        texts = await encoder.pieces(ids) if with_texts else None
        return {"count": len(ids), "max_model_len": limit_for(info), "tokens": list(ids), "token_strs": texts}

    async def encoded(request: Request) -> tuple[dict[str, object], dict[str, str]]:
        """The answer of ``/tokenize``, and its headers."""
        read = await read_fields(request, deps)
        if "messages" not in read.fields:
            got = received(read, deps, TokenizeRequest, refused=TOKENIZE_UNSUPPORTED)
            text, add_bos = got.request.prompt, got.request.add_special_tokens
            (ids,) = await encoder.texts([text], got.info, add_bos=add_bos, may_be_too_long=True)
            return await counted(ids, got.info, with_texts=got.request.return_token_strs), got.headers
        conversation, read = read.split(CONVERSATION_FIELDS)
        chat = received(read, deps, TokenizeChatRequest, refused=_CHAT_ONLY)
        ids, ignored = await conversation_ids(conversation, deps=deps, encoder=encoder, info=chat.info)
        answer = await counted(ids, chat.info, with_texts=chat.request.return_token_strs)
        return answer, warning_headers([*chat.ignored, *ignored])

    @router.post("/tokenize")
    @router.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        answer, headers = await encoded(request)
        return JsonResponse(answer, headers=headers)

    @router.post("/detokenize")
    @router.post("/v1/detokenize")
    async def detokenize(request: Request) -> Response:
        got = received(await read_fields(request, deps), deps, DetokenizeRequest, refused={})
        ids = got.request.tokens
        if ids and max(ids) >= deps.tokenizer.vocab_size:
            message = f"'tokens': token ids lie below {deps.tokenizer.vocab_size}."
            raise InvalidRequest(message, param="tokens", code="invalid_value")
        (text,) = await encoder.decoded([ids], skip_special_tokens=False)
        return JsonResponse({"prompt": text}, headers=got.headers)

    @router.post("/apply-template")
    @router.post("/v1/apply-template")
    async def apply_template(request: Request) -> Response:
        conversation, read = (await read_fields(request, deps)).split(CONVERSATION_FIELDS)
        got = received(read, deps, TokenizeChatRequest, refused=_CHAT_ONLY)
        ids, ignored = await conversation_ids(conversation, deps=deps, encoder=encoder, info=got.info)
        (text,) = await encoder.decoded([ids], skip_special_tokens=False)
        answer = await counted(ids, got.info, with_texts=got.request.return_token_strs)
        return JsonResponse({"prompt": text, **answer}, headers=warning_headers([*got.ignored, *ignored]))

    @router.get("/tokenizer_info")
    @router.get("/v1/tokenizer_info")
    async def tokenizer_info(request: Request) -> Response:
        deps.authenticate(request.headers)
        return JsonResponse(_tokenizer_facts(deps))

    return router


def _tokenizer_facts(deps: Dependencies) -> dict[str, Any]:
    tokenizer = deps.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "add_bos_token": tokenizer.bos_token_id is not None,
        "add_eos_token": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **tokenizer.named_tokens,
        "has_chat_template": deps.chat_template is not None,
    }
