"""The messages of a conversation: what a client may send, and what the text room gets.

Owns: ``Message``, ``joined_text``, the screening by role, the rules that span messages, and ``conversation_of``.
Content is text, given as a string or as text parts (joined by a line break); pictures, audio and files are refused:
this server opens no address that a request names.

A message of the role "tool" answers a call of an earlier assistant message, by that call's id. Results that stand side
by side are put into the order of their calls, because the model is shown no ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import StrictModel
from mixtral_serve.api.schemas.refused import Refused, Screen
from mixtral_serve.api.schemas.tools import FunctionName
from mixtral_serve.text.conversation import ChatMessage, FunctionCall

MAX_MESSAGE_CALLS: Final = 128

_COMMON: Final[Mapping[str, Refused]] = {
    "refusal": Refused("the model's messages have no refusals"),
    "annotations": Refused("the model's messages have no annotations", ([],)),
    "audio": Refused("messages are text"),
    "function_call": Refused("'tool_calls' has taken its place"),
}
_NO_NAME: Final = {"name": Refused("the model's messages have no names")}
_NO_CALLS: Final = {"tool_calls": Refused("only the assistant calls functions", ([],))}
_NO_RESULT: Final = {"tool_call_id": Refused("only a message of the role 'tool' answers a call")}
_OTHERS: Final = {**_COMMON, **_NO_NAME, **_NO_CALLS, **_NO_RESULT}
_BY_ROLE: Final[Mapping[object, Mapping[str, Refused]]] = {
    "assistant": {**_COMMON, **_NO_NAME, **_NO_RESULT},
    "tool": {**_COMMON, **_NO_CALLS},
}


def joined_text(value: object, *, types: Sequence[str] = ("text",), others: Sequence[str] = ()) -> object:
    """Content as one string: parts of these ``types`` are joined. They may have the fields ``others``, which are not
    looked at. What is no list is given back.

    Raises:
        PydanticCustomError: a part that is no text, or has other fields.
    """
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("invalid_type", "A part is an object with a type")
        if part["type"] not in types:
            raise PydanticCustomError("unsupported_parameter", "Only text parts are supported")
        if not isinstance(part.get("text"), str) or not set(part) <= {"type", "text", *others}:
            raise PydanticCustomError("invalid_type", "A text part has a text, and no field that is not known")
        texts.append(part["text"])
    return "\n".join(texts)


class CalledFunction(StrictModel):
    """What was called."""

    name: FunctionName
    arguments: str
    """JSON, as the model wrote it."""


class MessageCall(StrictModel):
    """A call that an earlier answer made."""

    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(joined_text, json_schema_input_type=str | list[dict[str, str]])] = (
        None
    )
    """A string or text parts. Only an assistant message with calls goes without."""
    name: FunctionName | None = None
    """With the role "tool": the function that was called."""
    tool_calls: list[MessageCall] = Field(default=[], max_length=MAX_MESSAGE_CALLS)
    """With the role "assistant": the functions that it called."""
    tool_call_id: str | None = Field(default=None, max_length=128)
    """With the role "tool": the call that this message answers."""


def screened_messages(messages: object, screen: Screen) -> object:
    """Messages without nulls and neutral unsupported fields; anything but a list as it is.

    Raises:
        InvalidRequest: an unsupported field, or a kind of message that is not supported.
    """
    if not isinstance(messages, list):
        return messages
    return [_screened(message, index, screen) for index, message in enumerate(messages)]


def _screened(message: object, index: int, screen: Screen) -> object:
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    if role == "function":
        param = f"messages[{index}].role"
        reason = f"'{param}': results of functions have the role 'tool'."
        raise InvalidRequest(reason, param=param, code="unsupported_parameter")
    refused = _BY_ROLE.get(role, _OTHERS) if isinstance(role, str) else _OTHERS
    kept = screen.fields(message, refused, path=f"messages[{index}].")
    if "tool_calls" in kept:
        kept["tool_calls"] = screen.within(kept["tool_calls"], f"messages[{index}].tool_calls", levels=2)
    return kept


def check_messages(messages: Sequence[Message], *, continue_final_message: bool) -> None:
    """Rules that span the fields of a message, or several messages.

    Raises:
        InvalidRequest: naming the field.
    """
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.content is None and not message.tool_calls:
            raise _missing(f"{path}.content")
        if message.role == "tool":
            _check_result(message, called, path)
        called.update({call.id: call.function.name for call in message.tool_calls})
    last = messages[-1]
    if continue_final_message and (last.role != "assistant" or last.tool_calls):
        reason = "'continue_final_message' needs a last message of the assistant, without calls."
        raise InvalidRequest(reason, param="continue_final_message", code="invalid_value")


def _check_result(message: Message, called: Mapping[str, str], path: str) -> None:
    if message.tool_call_id is None:
        raise _missing(f"{path}.tool_call_id")
    if message.tool_call_id not in called:
        param = f"{path}.tool_call_id"
        reason = f"'{param}' is not the id of a call in an earlier message of the assistant."
        raise InvalidRequest(reason, param=param, code="invalid_value")
    if message.name not in (None, called[message.tool_call_id]):
        param = f"{path}.name"
        raise InvalidRequest(f"'{param}' is not the function that was called.", param=param, code="invalid_value")


def _missing(param: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def conversation_of(messages: Sequence[Message]) -> list[ChatMessage]:
    """Checked messages in the text room's words."""
    places: dict[str, int] = {}
    names: dict[str, str] = {}
    told: list[ChatMessage] = []
    results: list[tuple[int, ChatMessage]] = []
    for message in messages:
        if message.role == "tool":
            call_id = message.tool_call_id or ""
            result = ChatMessage("tool", message.content or "", tool_name=names[call_id])
            results.append((places[call_id], result))
            continue
        told += _in_order(results)
        results = []
        for call in message.tool_calls:
            places[call.id] = len(places)
            names[call.id] = call.function.name
        calls = tuple(FunctionCall(call.function.name, call.function.arguments) for call in message.tool_calls)
        role = "system" if message.role == "developer" else message.role
        told.append(ChatMessage(role, message.content or "", calls=calls))
    return told + _in_order(results)


def _in_order(results: list[tuple[int, ChatMessage]]) -> list[ChatMessage]:
    return [message for _, message in sorted(results, key=lambda result: result[0])]
