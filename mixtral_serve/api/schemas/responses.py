"""``POST /v1/responses``: what a client may send.

Owns: ``ResponsesRequest``, the items of its input, and its screening. Sampling parameters are those of the other
endpoints, under the same names; what those call otherwise, or have and this endpoint has not, is refused by name.

Nothing is stored: ``store`` is false in every answer, and what refers to something stored is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import INT32_MAX, MAX_LOGPROBS, GenerationRequest, StrictModel
from mixtral_serve.api.schemas.messages import joined_text
from mixtral_serve.api.schemas.refused import MAX_ITEMS, Refused, Screen
from mixtral_serve.api.schemas.tools import MAX_TOOLS, FunctionName

LOGPROBS: Final = "message.output_text.logprobs"
_STATELESS: Final = "answers are not stored: send the whole conversation in 'input'"

RESPONSES_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    "access_programs": Refused("there is one way to be served"),
    "background": Refused("answers are not stored", (False,)),
    "background_options": Refused("answers are not stored", ({},)),
    "best_of": Refused("there is one answer", (1,)),
    "context_management": Refused("the conversation is taken as it is", ([],)),
    "conversation": Refused(_STATELESS),
    "image": Refused("messages are text", ({},)),
    "max_completion_tokens": Refused("the field is called 'max_output_tokens' here"),
    "max_tokens": Refused("the field is called 'max_output_tokens' here"),
    "max_tool_calls": Refused("there are no built-in tools"),
    "messages": Refused("the field is called 'input' here"),
    "moderation": Refused("nothing is moderated"),
    "n": Refused("there is one answer", (1,)),
    "previous_response_id": Refused(_STATELESS),
    "prompt": Refused("there are no stored prompts"),
    "prompt_cache_options": Refused("the cache decides by itself what it keeps", ({"mode": "implicit"},)),
    "prompt_cache_retention": Refused("prefixes are kept as long as there is memory for them", ("in_memory",)),
    "prompt_logprobs": Refused("the input is not scored"),
    "reasoning": Refused("the model does not reason before it answers", ({}, {"effort": "none"})),
    "response_format": Refused("the field is called 'text' here"),
    "return_progress": Refused("events of this endpoint have no place for it", (False,)),
    "return_token_ids": Refused("answers of this endpoint have no place for them", (False,)),
    "return_tokens_as_token_ids": Refused("answers of this endpoint have no place for them", (False,)),
    "store": Refused("answers are not stored", (False,)),
    "truncate_prompt_tokens": Refused("what is too long is refused"),
    "truncation": Refused("what is too long is refused", ("disabled",)),
    "truncation_side": Refused("what is too long is refused", ("left",)),
}
"""What is not here, and why."""
RESPONSE_STREAM_UNSUPPORTED: Final = {
    "continuous_usage_stats": Refused("counts come with the whole response", (False,)),
    "include_obfuscation": Refused("events are not padded", (False,)),
    "include_usage": Refused("counts come with the whole response", (False, True)),
}
TEXT_UNSUPPORTED: Final = {"verbosity": Refused("ask for it in the input", ("medium",))}
_TOOL_UNSUPPORTED: Final = {
    "allowed_callers": Refused("the model calls by itself", (["direct"],)),
    "async": Refused("calls are for the client to make", (False,)),
    "defer_loading": Refused("every function is shown to the model", (False,)),
    "output_schema": Refused("results are text"),
}
_ITEM_UNSUPPORTED: Final = {
    "caller": Refused("the model calls by itself"),
    "async": Refused("calls are for the client to make", (False,)),
    "namespace": Refused("functions have plain names"),
}
_PART_TYPES: Final = ("input_text", "output_text", "text")


def _text(value: object) -> object:
    return joined_text(value, types=_PART_TYPES, others=("annotations", "logprobs"))


_Parts = str | list[dict[str, Any]]
Content = Annotated[str, BeforeValidator(_text, json_schema_input_type=_Parts)]
CallId = Annotated[str, Field(min_length=1, max_length=128)]
ItemId = Annotated[str, Field(max_length=128)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class MessageItem(StrictModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    """A string or text parts."""
    id: ItemId | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(StrictModel):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: ItemId | None = None
    status: ItemStatus | None = None


class CallOutputItem(StrictModel):
    """What a call came to."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content
    id: ItemId | None = None
    status: ItemStatus | None = None


def _kind_of(value: object) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(
        _kind_of,
        custom_error_type="invalid_value",
        custom_error_message="An item is a message, a function_call or a function_call_output",
    ),
]


def _items(value: object) -> object:
    """A text is the user's message."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object; without it there are none."""
    strict: bool = True
    """Calls are constrained to ``parameters`` either way."""


class TextFormat(StrictModel):
    """What the answer's text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(StrictModel):
    """How the answer is written."""

    format: TextFormat | None = None
    """Plain text, a JSON object, or what a JSON schema describes: ``type``, ``name``, ``schema``."""


class ResponsesRequest(GenerationRequest):
    """A request for a response."""

    input: Annotated[
        list[InputItem],
        BeforeValidator(_items, json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1)]),
        Field(min_length=1, max_length=MAX_ITEMS),
    ]
    """A text, or the conversation as items: messages, calls of functions and what they came to."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    """Most tokens of the answer; by default what the context leaves."""
    text: TextConfig | None = None
    """What the answer's text looks like."""
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS)
    """Functions that the model may call."""
    tool_choice: Any = "auto"
    """``none``, ``auto``, ``required``, a function, or allowed tools."""
    parallel_tool_calls: bool = True
    """An answer may have several calls."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """So many of the likeliest tokens at each position. Only with ``include``; 0 asks for none."""
    include: list[str] = Field(default=[], max_length=16)
    """``message.output_text.logprobs``: log-probabilities of the answer's tokens. Documented names of what this
    server's answers never have are accepted: there is nothing to include."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier: the answer says ``default``."""

    def check_fields(self, *, max_n: int) -> None:
        """See ``GenerationRequest``."""
        super().check_fields(max_n=max_n)
        for index, name in enumerate(self.include):
            if name not in _INCLUDABLE:
                param = f"include[{index}]"
                raise InvalidRequest(f"'{param}' is not documented.", param=param, code="invalid_value")
        if self.top_logprobs and LOGPROBS not in self.include:
            message = f"'top_logprobs' needs '{LOGPROBS}' in 'include'."
            raise InvalidRequest(message, param="top_logprobs", code="invalid_value")

    @property
    def text_format(self) -> TextFormat:
        """What the answer's text must look like; plain text where nothing is said."""
        stated = None if self.text is None else self.text.format
        return stated or TextFormat(type="text")

    def asked_max_tokens(self) -> int | None:
        """See ``GenerationRequest``."""
        return self.max_output_tokens

    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return (self.top_logprobs or 0) if LOGPROBS in self.include else None


_INCLUDABLE: Final = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)


def sent_place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place in ``ResponsesRequest`` as the client knows it: without the mark that tells kinds of items apart."""
    is_in_item = location[:1] == ("input",) and len(location) > 2 and isinstance(location[1], int)
    return location[:2] + location[3:] if is_in_item else location


def screened_responses(fields: Mapping[str, Any], screen: Screen) -> dict[str, Any]:
    """A body without nulls and neutral unsupported fields, in all its parts.

    Raises:
        InvalidRequest: an unsupported field.
    """
    kept = screen.fields(fields, RESPONSES_UNSUPPORTED)
    inner = {"stream_options": RESPONSE_STREAM_UNSUPPORTED, "text": TEXT_UNSUPPORTED}
    for name, refused in inner.items():
        if isinstance(kept.get(name), dict):
            kept[name] = screen.fields(kept[name], refused, path=f"{name}.")
    lists = {"input": (_ITEM_UNSUPPORTED, MAX_ITEMS), "tools": (_TOOL_UNSUPPORTED, MAX_TOOLS)}
    for name, (refused, most) in lists.items():
        items = kept.get(name)
        if isinstance(items, list) and len(items) <= most:
            kept[name] = [
                screen.fields(item, refused, path=f"{name}[{index}].") if isinstance(item, dict) else item
                for index, item in enumerate(items)
            ]
        elif isinstance(items, list):
            raise InvalidRequest(f"'{name}' has too many items.", param=name, code="array_above_max_length")
    # What is neutral is gone; an option that is unknown stays, and is refused as such.
    if kept.get("stream_options") == {}:
        del kept["stream_options"]
    return kept
