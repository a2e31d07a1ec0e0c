"""``GET /openapi.json``: the description of this API, made from the models that requests are checked with.

Owns: ``openapi_document`` and the table of operations. The routes parse bodies themselves, so the framework knows
nothing of them; a test compares the table with the routes, and another sends what the document allows and much that it
does not.

What is described is what happens: ``null`` stands for absence in every optional field, and a refused parameter is
listed with the values that pass because they ask for nothing. Rules that span several fields are not in it; breaking
one is a 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mixtral_serve.api.openapi_answers import ANSWERS, ERROR
from mixtral_serve.api.schemas.chat import ChatRequest
from mixtral_serve.api.schemas.completions import CompletionRequest
from mixtral_serve.api.schemas.embeddings import EMBEDDING_UNSUPPORTED, EmbeddingRequest
from mixtral_serve.api.schemas.refused import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, Refused
from mixtral_serve.api.schemas.responses import RESPONSES_UNSUPPORTED, ResponsesRequest
from mixtral_serve.api.schemas.tokens import (
    CONVERSATION_FIELDS,
    TOKENIZE_UNSUPPORTED,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)

_REF: Final = "#/components/schemas/{model}"
_REFUSED: Final[Mapping[type[BaseModel], Mapping[str, Refused]]] = {
    ChatRequest: CHAT_UNSUPPORTED,
    CompletionRequest: COMPLETION_UNSUPPORTED,
    ResponsesRequest: RESPONSES_UNSUPPORTED,
    EmbeddingRequest: EMBEDDING_UNSUPPORTED,
    TokenizeRequest: TOKENIZE_UNSUPPORTED,
    TokenizeChatRequest: TOKENIZE_UNSUPPORTED,
    DetokenizeRequest: {},
}
_BODY_ERRORS: Final = (400, 404, 408, 413, 415, 429, 500, 503)
_ERRORS: Final = {
    400: "Something in the request is not valid; ``param`` names it.",
    404: "There is no such model, or no such request.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    429: "Too many requests wait. Come again after ``Retry-After`` seconds.",
    500: "The server, or the model on this request, failed.",
    503: "No request is taken now. Come again after ``Retry-After`` seconds.",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answer: str
    """Name of the answer's schema, or its media type where it is not JSON."""
    body: tuple[type[BaseModel], ...] = ()
    """What the body may be; empty: nothing is read."""
    streams: bool = False
    errors: tuple[int, ...] = (500,)
    parameter: str | None = None
    """The parameter in the path."""


def _token_operations(prefix: str) -> tuple[Operation, ...]:
    tokenize = (TokenizeRequest, TokenizeChatRequest)
    errors = _BODY_ERRORS
    return (
        Operation("post", f"{prefix}/tokenize", "Text or messages to tokens", "Tokens", tokenize, errors=errors),
        Operation("post", f"{prefix}/detokenize", "Tokens to text", "Text", (DetokenizeRequest,), errors=errors),
        Operation(
            "post",
            f"{prefix}/apply-template",
            "Messages to the prompt that they become",
            "RenderedPrompt",
            (TokenizeChatRequest,),
            errors=errors,
        ),
        Operation("get", f"{prefix}/tokenizer_info", "Facts of the tokenizer", "TokenizerInfo"),
    )


OPERATIONS: Final = (
    Operation("post", "/v1/chat/completions", "Answer a chat", "ChatCompletion", (ChatRequest,), True, _BODY_ERRORS),
    Operation("post", "/v1/completions", "Continue a text", "Completion", (CompletionRequest,), True, _BODY_ERRORS),
    Operation("post", "/v1/responses", "Answer a chat", "Response", (ResponsesRequest,), True, _BODY_ERRORS),
    Operation("post", "/v1/embeddings", "Embed texts", "Embeddings", (EmbeddingRequest,), errors=_BODY_ERRORS),
    *_token_operations(""),
    *_token_operations("/v1"),
    Operation("get", "/v1/requests", "Requests that run or wait", "RequestTable", errors=(500, 503)),
    Operation(
        "post",
        "/v1/requests/{request_id}/cancel",
        "End a request",
        "CancelledRequest",
        errors=(404, 500),
        parameter="request_id",
    ),
    Operation("get", "/v1/models", "What is served", "ModelList"),
    Operation("get", "/v1/models/{model_id}", "One model", "Model", errors=(404, 500), parameter="model_id"),
    Operation("get", "/livez", "Whether the process lives", "Status"),
    Operation("get", "/readyz", "Whether requests are taken", "Status", errors=(500, 503)),
    Operation("get", "/health", "The older name of /readyz", "Status", errors=(500, 503)),
    Operation("get", "/version", "The server's version", "Version"),
    Operation("get", "/memory", "What is planned and measured", "MemoryReport"),
    Operation("get", "/metrics", "Metrics for Prometheus", "text/plain"),
    Operation("get", "/openapi.json", "This document", "Document"),
)


@cache
def openapi_document(version: str) -> dict[str, Any]:
    """The document, as plain values that nobody changes."""
    models = list(_REFUSED)
    _, generated = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas: dict[str, Any] = generated.get("$defs", {})
    for model, refused in _REFUSED.items():
        schemas[model.__name__] = _with_absences(schemas[model.__name__], refused)
    _let_conversations_in(schemas)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mixtral-serve", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas, **ANSWERS, "Error": ERROR}},
    }


def _with_absences(schema: dict[str, Any], refused: Mapping[str, Refused]) -> dict[str, Any]:
    """The schema of a body: null is absence, and what is refused passes where it asks for nothing."""
    required = schema.get("required", [])
    properties = {
        name: value if name in required else {"anyOf": [value, {"type": "null"}]}
        for name, value in schema["properties"].items()
        if name not in refused or refused[name].is_field
    }
    for name, rule in refused.items():
        if not rule.is_field:
            properties[name] = {"enum": [None, *rule.neutral], "description": f"Not supported: {rule.reason}."}
    return {**schema, "properties": properties}


def _let_conversations_in(schemas: dict[str, Any]) -> None:
    """A conversation's fields are checked apart from those beside them, by the chat endpoint's model."""
    chat, beside = schemas[ChatRequest.__name__], schemas[TokenizeChatRequest.__name__]
    for name in sorted(CONVERSATION_FIELDS):
        beside["properties"][name] = chat["properties"][name]
    beside["required"] = ["messages"]
    beside["properties"]["add_special_tokens"] = {"enum": [None, False]}


def _described(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.method + operation.path.translate(_TO_NAME),
        "summary": operation.summary,
        "responses": {"200": _answer(operation), **{str(status): _error(status) for status in operation.errors}},
    }
    if operation.body:
        forms: list[dict[str, Any]] = [{"$ref": _REF.format(model=model.__name__)} for model in operation.body]
        schema: dict[str, Any] = forms[0] if len(forms) == 1 else {"anyOf": forms}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.parameter is not None:
        text = {"type": "string", "minLength": 1}
        described["parameters"] = [{"name": operation.parameter, "in": "path", "required": True, "schema": text}]
    return described


_TO_NAME: Final = str.maketrans({"/": "_", "-": "_", ".": "_", "{": None, "}": None})
_ID_HEADER: Final = {
    "x-request-id": {"description": "Made by the server.", "required": True, "schema": {"type": "string"}}
}
_RETRY_HEADER: Final = {
    "retry-after": {"description": "Seconds.", "required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}
}


def _answer(operation: Operation) -> dict[str, Any]:
    if "/" in operation.answer:
        content: dict[str, Any] = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=operation.answer)}}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": operation.summary, "headers": _ID_HEADER, "content": content}


def _error(status: int) -> dict[str, Any]:
    headers = {**_ID_HEADER, **_RETRY_HEADER} if status in (429, 503) else _ID_HEADER
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {"description": _ERRORS[status], "headers": headers, "content": content}
