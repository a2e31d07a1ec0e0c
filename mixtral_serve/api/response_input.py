"""From a request for a response to the chat request that means the same.

Owns: ``chat_of`` and ``in_own_words``. A conversation, its functions and the form of its answer are checked and encoded
in one place, the chat endpoint's: this file only translates, and translates the names in error messages back, so that
each message speaks of the fields that the client sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from mixtral_serve.api.conversations import checked_conversation
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.chat import ChatRequest
from mixtral_serve.api.schemas.responses import CallItem, CallOutputItem, MessageItem, ResponsesRequest

_MESSAGE: Final = re.compile(r"messages(?:\[(\d+)\][^\s':]*)?")
_PLAIN: Final = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("].function", "]"),
    ("tool_choice.function.", "tool_choice."),
    ("tool_choice.allowed_tools.", "tool_choice."),
)


def chat_of(asked: ResponsesRequest, deps: Dependencies) -> ChatRequest:
    """The chat request with the same conversation, functions and form of the answer.

    Raises:
        InvalidRequest: the chat endpoint would refuse it; the names are those of ``asked``.
    """
    messages, places = _messages(asked)
    fields: dict[str, Any] = {
        "messages": messages,
        "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in asked.tools],
        "tool_choice": _tool_choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": _response_format(asked),
    }
    try:
        return checked_conversation(fields, deps).request  # nothing is dropped: these fields are our own
    except InvalidRequest as error:
        raise in_own_words(error, places) from None


def in_own_words(error: InvalidRequest, places: Sequence[int | None] = ()) -> InvalidRequest:
    """What the chat endpoint's parts say of their fields, said of the fields that the client sent.

    ``places``: for each message the item that it comes from.
    """
    return InvalidRequest(
        _sent_name(str(error), places),
        param=None if error.param is None else _sent_name(error.param, places),
        code=error.code,
    )


def _messages(asked: ResponsesRequest) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Messages, and for each the item that it comes from (None: the instructions). Calls side by side are one."""
    messages: list[dict[str, Any]] = []
    places: list[int | None] = []
    if asked.instructions is not None:
        messages.append({"role": "system", "content": asked.instructions})
        places.append(None)
    for place, item in enumerate(asked.input):
        if isinstance(item, CallItem) and messages and "tool_calls" in messages[-1]:
            messages[-1]["tool_calls"].append(_call(item))
            continue
        messages.append(_message(item))
        places.append(place)
    return messages, places


def _message(item: MessageItem | CallItem | CallOutputItem) -> dict[str, Any]:
    if isinstance(item, CallItem):
        return {"role": "assistant", "tool_calls": [_call(item)]}
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
    return {"role": item.role, "content": item.content}


def _call(item: CallItem) -> dict[str, Any]:
    return {
        "id": item.call_id,
        "type": "function",
        "function": {"name": item.name, "arguments": item.arguments},
    }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": tool.pop("type"), "function": tool}


def _tool_choice(choice: object) -> object:
    """The flat form of this endpoint as the nested one of the chat endpoint; what it is not stays as it is."""
    if not isinstance(choice, dict):
        return choice
    rest = {key: value for key, value in choice.items() if key != "type"}
    if choice.get("type") == "function":
        return {"type": "function", "function": rest}
    if choice.get("type") == "allowed_tools":
        tools = rest.get("tools")
        if isinstance(tools, list):
            rest["tools"] = [_tool(dict(tool)) if isinstance(tool, dict) and "type" in tool else tool for tool in tools]
        return {"type": "allowed_tools", "allowed_tools": rest}
    return choice


def _response_format(asked: ResponsesRequest) -> dict[str, Any]:
    described = asked.text_format.model_dump(by_alias=True, exclude_none=True)
    kind = described.pop("type")
    if kind == "json_schema" or described:
        return {"type": kind, "json_schema": described}
    return {"type": kind}


def _sent_name(text: str, places: Sequence[int | None]) -> str:
    def place(match: re.Match[str]) -> str:
        if match[1] is None:
            return "input"
        index = places[int(match[1])]
        return "instructions" if index is None else f"input[{index}]"

    text = _MESSAGE.sub(place, text)
    for old, new in _PLAIN:
        text = text.replace(old, new)
    return text
