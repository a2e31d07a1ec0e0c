"""``POST /v1/embeddings``: the mean of a text's last hidden states, of length one.

Each input is a request of its own, scheduled like any other. Of a call with many inputs only so many are under way at
once, so that one call neither fills the queue nor is refused for being larger than it. The client's leaving ends
those that are under way, and no more are begun.
"""

from __future__ import annotations

import base64
import math
import secrets
import sys
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from mixtral_serve.api.convert import finish_reason
from mixtral_serve.api.deps import Dependencies, Engine
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.reading import Received, read_fields, received
from mixtral_serve.api.responses import JsonResponse, until_disconnect
from mixtral_serve.api.schemas.embeddings import EMBEDDING_UNSUPPORTED, EmbeddingRequest
from mixtral_serve.engine.errors import PromptTooLong, TokenOutOfRange
from mixtral_serve.engine.messages import Submit
from mixtral_serve.engine.stream import TokenStream
from scheduler.request import RequestKind

_AT_ONCE: Final = 64


def embedding_routes(deps: Dependencies, encoder: PromptEncoder) -> APIRouter:
    """The embeddings endpoint."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        got = received(await read_fields(request, deps), deps, EmbeddingRequest, refused=EMBEDDING_UNSUPPORTED)
        asked = got.request
        _check_dimensions(asked.dimensions, got.info.hidden_size)
        texts = [text for text in asked.input if isinstance(text, str)]
        encoded = iter(await encoder.texts(texts, got.info, param="input"))
        prompts = [next(encoded) if isinstance(text, str) else text for text in asked.input]
        submits = _submits(prompts, got)
        try:
            vectors = await until_disconnect(request.receive, _computed(deps.engine, submits, asked))
        except (PromptTooLong, TokenOutOfRange) as error:
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else "invalid_value"
            raise InvalidRequest(f"'input': {error}", param="input", code=code) from None
        num_tokens = sum(map(len, prompts))
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "model": got.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return JsonResponse(answer, headers=got.headers)

    return router


def _check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    if hidden_size == 0:
        raise InvalidRequest("The model gives no embeddings.", param="model", code="unsupported_parameter")
    if dimensions is not None and dimensions > hidden_size:
        message = f"'dimensions' is at most {hidden_size}, the model's own."
        raise InvalidRequest(message, param="dimensions", code="integer_above_max_value")


def _submits(prompts: Sequence[array[int]], got: Received[EmbeddingRequest]) -> list[Submit]:
    answer_id = f"embd-{secrets.token_hex(16)}"
    return [
        Submit(
            request_id=f"{answer_id}-{index}",
            prompt=prompt.tobytes(),
            arrival_s=got.arrival_s,
            kind=RequestKind.EMBED,
            priority=got.request.priority,
            tenant=got.caller.tenant,
        )
        for index, prompt in enumerate(prompts)
    ]


async def _computed(engine: Engine, submits: Sequence[Submit], asked: EmbeddingRequest) -> list[msgspec.Raw]:
    """The embeddings of all ``submits``, in their order, as JSON. Each is spelled when it comes: two thousand of them
    as numbers would take hundreds of megabytes, and a second of everybody's time at the end."""
    embeddings: list[msgspec.Raw] = []
    for first in range(0, len(submits), _AT_ONCE):
        streams = engine.submit(submits[first : first + _AT_ONCE])
        try:
            embeddings += [
                _spelled(_normalised(await _embedding(stream), asked.dimensions), asked) for stream in streams
            ]
        finally:
            for stream in streams:
                stream.cancel()
    return embeddings


async def _embedding(stream: TokenStream) -> tuple[float, ...]:
    vector: tuple[float, ...] | None = None
    async for delta in stream:
        finish_reason(delta)  # raises where the server ended the request
        vector = delta.embedding
    assert vector is not None, "an embedding that was computed comes with the last delta"
    return vector


def _normalised(vector: tuple[float, ...], dimensions: int | None) -> tuple[float, ...]:
    """The leading elements that were asked for, of length one."""
    kept = vector[:dimensions]
    length = math.hypot(*kept)
    return tuple([element / length for element in kept]) if length else kept


def _spelled(vector: tuple[float, ...], asked: EmbeddingRequest) -> msgspec.Raw:
    if asked.encoding_format == "float":
        return msgspec.Raw(msgspec.json.encode(vector))
    floats = array("f", vector)
    if sys.byteorder == "big":  # the form is little-endian everywhere
        floats.byteswap()
    return msgspec.Raw(b'"%b"' % base64.b64encode(floats.tobytes()))
