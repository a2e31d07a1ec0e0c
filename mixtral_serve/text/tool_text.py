"""Functions, calls and results as text, for models that have no control tokens for them.

Owns: how definitions are presented to the model, how a call stands in the conversation, and how a result comes back.
Mixtral 8x7B has no tool tokens (version 1 of Mistral's format refuses tools), so all three are ordinary text:

* definitions: ``You can call these functions: `` and a JSON array of them, at the end of the system message;
* calls: the assistant's turn is a JSON array, ``[{"name": "f", "arguments": {"x": 1}}, ...]``;
* results: a user's turn ``Result of f: `` and what the function returned, one after the other.

JSON is spelled with one blank after ``,`` and ``:``, keys in the order in which the client gave them, characters beyond
ASCII as themselves. The same request is therefore the same text, and the prefix cache finds it again. The ids of calls
are not shown: they are random, and the order says what belongs to what. The bundled model was trained on exactly the
first two forms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from mixtral_serve.text.conversation import BLANK_LINE, ChatMessage, FunctionCall

PRESENTATION: Final = "You can call these functions: "


def tools_text(tools: Sequence[Mapping[str, object]]) -> str:
    """The definitions as the model reads them. Each is ``{"type": "function", "function": {...}}``."""
    return PRESENTATION + _json(list(tools))


def calls_text(calls: Sequence[FunctionCall]) -> str:
    """Calls as the model writes them. Arguments that are no JSON, or no text, appear as a string."""
    spelled = [f'{{"name": {_json(call.name)}, "arguments": {_arguments(call.arguments)}}}' for call in calls]
    return f"[{', '.join(spelled)}]"


def result_text(name: str, content: str) -> str:
    """What the function ``name`` returned."""
    return f"Result of {name}: {content}"


def with_tools(messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, object]] = ()) -> list[ChatMessage]:
    """The conversation with system, user and assistant messages of text alone.

    ``tools`` are presented by a system message after those at the start.
    """
    plain = [_plain(message) for message in messages]
    if tools:
        first = next((index for index, message in enumerate(plain) if message.role != "system"), len(plain))
        plain.insert(first, ChatMessage("system", tools_text(tools)))
    return plain


def _plain(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", result_text(message.tool_name, message.content))
    if message.calls:
        texts = [message.content, calls_text(message.calls)]
        return ChatMessage(message.role, BLANK_LINE.join(filter(None, texts)))
    return message


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments(arguments: str) -> str:
    """JSON of a call's arguments. What cannot be spelled anew, lone surrogates for one, is a string as it came."""
    try:
        spelled = _json(json.loads(arguments or "{}"))
        spelled.encode()
    except (ValueError, RecursionError):
        return _json(arguments)
    return spelled
