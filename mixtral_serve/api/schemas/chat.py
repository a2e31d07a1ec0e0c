"""``POST /v1/chat/completions``: what a client may send.

Owns: ``ChatRequest``, its messages, and the table of chat fields that are refused by name. Content is text, given
as a string or as text parts (joined by a line break); pictures, audio and files are refused: this server opens
no address that a request names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import (
    MAX_ITEMS,
    MAX_LOGPROBS,
    UNSUPPORTED,
    GenerationRequest,
    StrictModel,
    refuse_unsupported,
)
from mixtral_serve.text.conversation import ChatMessage

CHAT_UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    **UNSUPPORTED,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "echo": (False,),
}
MESSAGE_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}


def _text(value: object) -> object:
    """Content as one string: text parts are joined."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("invalid_type", "A part is an object with a type")
        if part["type"] != "text":
            raise PydanticCustomError("unsupported_parameter", "Only text parts are supported")
        if not isinstance(part.get("text"), str) or len(part) != 2:
            raise PydanticCustomError("invalid_type", "A text part has a text and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(StrictModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class ChatRequest(GenerationRequest):
    """A chat completion request."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def check_fields(self, *, max_n: int) -> None:
        """See ``GenerationRequest``."""
        super().check_fields(max_n=max_n)
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' contradict each other.",
                param="max_completion_tokens",
                code="invalid_value",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs'.", param="top_logprobs", code="invalid_value")

    def asked_max_tokens(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[ChatMessage]:
        """The messages in the text room's words."""
        return [
            ChatMessage("system" if message.role == "developer" else message.role, message.content)
            for message in self.messages
        ]


def screened_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat body without nulls and neutral unsupported fields.

    Raises:
        InvalidRequest: an unsupported field, or a kind of message that is not supported.
    """
    kept = refuse_unsupported(fields, CHAT_UNSUPPORTED)
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [_screened_message(message, index) for index, message in enumerate(messages)]
    return kept


def _screened_message(message: object, index: int) -> object:
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        param = f"messages[{index}].role"
        raise InvalidRequest(f"'{param}': tools are not supported.", param=param, code="unsupported_parameter")
    return refuse_unsupported(message, MESSAGE_UNSUPPORTED, path=f"messages[{index}].")
