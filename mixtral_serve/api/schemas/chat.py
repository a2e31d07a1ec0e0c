"""``POST /v1/chat/completions``: what a client may send.

Owns: ``ChatRequest``. Its messages are in ``schemas.messages``, its tools in ``schemas.tools``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import INT32_MAX, MAX_LOGPROBS
from mixtral_serve.api.schemas.messages import Message, check_messages, conversation_of, screened_messages
from mixtral_serve.api.schemas.refused import CHAT_UNSUPPORTED, MAX_ITEMS, Screen
from mixtral_serve.api.schemas.structured import StructuredRequest
from mixtral_serve.api.schemas.tools import MAX_TOOLS, AnyToolChoice, Tool, check_tools
from mixtral_serve.text.conversation import ChatMessage, Rendering


class ChatRequest(StructuredRequest):
    """A chat completion request."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    """The conversation. Content is a string or text parts."""
    max_completion_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    """The newer name of ``max_tokens``; by default what the context leaves."""
    logprobs: bool = False
    """Log-probabilities of the answer's tokens, of the logits as the model gives them."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """So many of the likeliest tokens at each position. Only with ``logprobs``."""
    tools: list[Tool] = Field(default=[], max_length=MAX_TOOLS)
    """Functions that the model may call. A call names one of them; its arguments validate against the parameters."""
    tool_choice: AnyToolChoice | None = None
    """``none``: functions are not shown to the model. ``auto``, the default: it answers with text or with calls.
    ``required``: with calls. A function: with one call of it. Allowed tools: only these are called."""
    parallel_tool_calls: bool = True
    """An answer may have several calls."""
    add_generation_prompt: bool | None = None
    """The answer is a new message: true, unless ``continue_final_message`` is. False leaves out what invites one."""
    continue_final_message: bool = False
    """The answer goes on with the last message, which is the assistant's. Not while ``tools`` are offered."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier: the answer says ``default``."""

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

        check_messages(self.messages, continue_final_message=self.continue_final_message)
        check_tools(self.tools, self.tool_choice)
        if self.offers_tools:
            self._check_text_beside_calls()
        self._check_continuation()

    def _check_text_beside_calls(self) -> None:
        """Calls are an array, so an object can be told from them at its first character; other forms cannot."""
        if self.structured_outputs is not None:
            message = "'structured_outputs' and 'tools' both say what the answer looks like."
            raise InvalidRequest(message, param="structured_outputs", code="invalid_value")
        schema = self.schema_of_text
        if schema is not None and schema.get("type") != "object":
            param = "response_format.json_schema.schema"
            message = f"'{param}' is of the type 'object' where 'tools' are offered."
            raise InvalidRequest(message, param=param, code="invalid_value")

    def _check_continuation(self) -> None:
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise InvalidRequest(
                "'add_generation_prompt' and 'continue_final_message' contradict each other.",
                param="add_generation_prompt",
                code="invalid_value",
            )
        if self.offers_tools:
            raise InvalidRequest(
                "'continue_final_message' continues a text: it needs 'tool_choice' to be 'none'.",
                param="continue_final_message",
                code="invalid_value",
            )

    @property
    def offers_tools(self) -> bool:
        """Whether the model is shown functions."""
        return bool(self.tools) and (self.tool_choice is None or self.tool_choice.type != "none")

    @property
    def schema_of_text(self) -> Mapping[str, Any] | None:
        """What ``response_format`` demands of an answer that is no call; None where any text will do."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        return {"type": "object"} if asked.json_schema is None else asked.json_schema.json_schema

    def asked_max_tokens(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[ChatMessage]:
        """The messages in the text room's words."""
        return conversation_of(self.messages)

    def rendering(self) -> Rendering:
        """How the conversation becomes a prompt."""
        return Rendering(
            tools=tuple(tool.function.described() for tool in self.tools) if self.offers_tools else (),
            add_generation_prompt=self.add_generation_prompt is not False and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
        )


def screened_chat(fields: Mapping[str, Any], screen: Screen) -> dict[str, Any]:
    """A chat body without nulls and neutral unsupported fields.

    Raises:
        InvalidRequest: an unsupported field, or a kind of message that is not supported.
    """
    kept = screen.request(fields, CHAT_UNSUPPORTED)
    if "messages" in kept:
        kept["messages"] = screened_messages(kept["messages"], screen)
    for name, levels in {"tools": 2, "tool_choice": 4}.items():
        if name in kept:
            kept[name] = screen.within(kept[name], name, levels=levels)
    return kept
