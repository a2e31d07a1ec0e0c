"""The schemas of answers, as ``openapi`` shows them.

Owns: ``ANSWERS`` and ``ERROR``. Answers are put together from bytes and plain values, not from models, so their schemas
are written here; a test compares them with what is really answered. An object has its required fields and may have
more: what a request did not ask for is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_TIME: Final[Schema] = {"type": "integer", "description": "Unix time, seconds."}
_FLAG: Final[Schema] = {"type": "boolean"}
_ANY: Final[Schema] = {}


def _constant(value: str) -> Schema:
    return {"const": value}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


_USAGE: Final = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_HEAD: Final[Mapping[str, Schema]] = {"id": _TEXT, "created": _TIME, "model": _TEXT, "system_fingerprint": _TEXT}
_CALL: Final = _object(
    {
        "id": _TEXT,
        "type": _constant("function"),
        "function": _object({"name": _TEXT, "arguments": _TEXT}),
    }
)
_CHAT_CHOICE: Final = _object(
    {
        "index": _COUNT,
        "message": _object(
            {"role": _constant("assistant"), "content": _or_null(_TEXT), "refusal": {"type": "null"}},
            {"tool_calls": _list(_CALL)},
        ),
        "logprobs": _or_null(_object({"content": _ANY})),
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    }
)
_COMPLETION_CHOICE: Final = _object(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _or_null(_object({"tokens": _list(_TEXT)})),
        "finish_reason": {"enum": ["stop", "length"]},
    }
)
_TEXT_PART: Final = _object(
    {"type": _constant("output_text"), "text": _TEXT, "annotations": _list(_ANY), "logprobs": _list(_ANY)}
)
_ITEM_STATUS: Final[Schema] = {"enum": ["completed", "incomplete"]}
_OUTPUT_ITEM: Final[Schema] = {
    "anyOf": [
        _object(
            {
                "type": _constant("message"),
                "id": _TEXT,
                "role": _constant("assistant"),
                "status": _ITEM_STATUS,
                "content": _list(_TEXT_PART),
            }
        ),
        _object(
            {
                "type": _constant("function_call"),
                "id": _TEXT,
                "call_id": _TEXT,
                "name": _TEXT,
                "arguments": _TEXT,
                "status": _ITEM_STATUS,
            }
        ),
    ]
}
_RESPONSE_USAGE: Final = _object(
    {
        "input_tokens": _COUNT,
        "input_tokens_details": _object({"cached_tokens": _COUNT, "cache_write_tokens": _COUNT}),
        "output_tokens": _COUNT,
        "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
        "total_tokens": _COUNT,
    }
)
_TOKENS: Final[Mapping[str, Schema]] = {
    "count": _COUNT,
    "max_model_len": _COUNT,
    "tokens": _list(_COUNT),
    "token_strs": _or_null(_list(_TEXT)),
}
_MODEL: Final = _object(
    {
        "id": _TEXT,
        "object": _constant("model"),
        "created": _TIME,
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": {"type": "null"},
        "max_model_len": _or_null(_COUNT),
    }
)
_REQUEST: Final = _object(
    {
        "id": _TEXT,
        "object": _constant("request"),
        "choice": _COUNT,
        "kind": {"enum": ["generate", "score", "embed"]},
        "status": {"enum": ["running", "waiting", "preempted"]},
        "priority": {"type": "integer"},
        "age_s": {"type": "number", "minimum": 0},
        "prompt_tokens": _COUNT,
        "computed_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "max_tokens": _COUNT,
        "preemptions": _COUNT,
        "blocking_reason": _or_null(_TEXT),
        "requests_ahead": _or_null(_COUNT),
        "estimated_wait_s": _or_null({"type": "number", "minimum": 0}),
    }
)

ANSWERS: Final[Mapping[str, Schema]] = {
    "ChatCompletion": _object(
        {**_HEAD, "object": _constant("chat.completion"), "choices": _list(_CHAT_CHOICE), "usage": _USAGE}
    ),
    "Completion": _object(
        {**_HEAD, "object": _constant("text_completion"), "choices": _list(_COMPLETION_CHOICE), "usage": _USAGE}
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": _constant("response"),
            "created_at": _TIME,
            "model": _TEXT,
            "status": {"enum": ["completed", "incomplete"]},
            "output": _list(_OUTPUT_ITEM),
            "usage": _RESPONSE_USAGE,
            "store": {"const": False},
        }
    ),
    "Embeddings": _object(
        {
            "object": _constant("list"),
            "data": _list(
                _object(
                    {
                        "object": _constant("embedding"),
                        "index": _COUNT,
                        "embedding": {"anyOf": [_list({"type": "number"}), _TEXT]},
                    }
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Tokens": _object(_TOKENS),
    "RenderedPrompt": _object({"prompt": _TEXT, **_TOKENS}),
    "Text": _object({"prompt": _TEXT}),
    "TokenizerInfo": _object({"tokenizer_class": _TEXT, "vocab_size": _COUNT, "has_chat_template": _FLAG}),
    "RequestTable": _object(
        {
            "object": _constant("list"),
            "data": _list(_REQUEST),
            "running": _COUNT,
            "waiting": _COUNT,
            "preempted": _COUNT,
            "has_more": _FLAG,
        }
    ),
    "CancelledRequest": _object(
        {"id": _TEXT, "object": _constant("request.cancelled"), "cancelled_choices": {"type": "integer", "minimum": 1}}
    ),
    "ModelList": _object({"object": _constant("list"), "data": _list(_MODEL)}),
    "Model": _MODEL,
    "Status": _object({"status": _constant("ok")}),
    "Version": _object({"version": _TEXT}),
    "MemoryReport": {"type": "object"},
    "Document": {"type": "object", "required": ["openapi", "info", "paths"]},
}

ERROR: Final = _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _TEXT})})
