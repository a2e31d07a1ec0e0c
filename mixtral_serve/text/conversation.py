"""Conversations as clients send them, and as Mixtral's templates want them.

Owns: ``ChatMessage``, ``Rendering`` and ``arranged``. Mixtral's templates demand user, assistant, user, assistant, ...;
the OpenAI API allows any order of roles. ``arranged`` closes the gap, so that no ordinary conversation fails:

* neighbours of the same role become one message, joined by a blank line;
* system messages at the start stay one system message, or, for templates without that role, go in front of the
  first user message; later ones speak with the user's voice where they stand;
* a conversation that starts with the assistant gets an empty user message before it.

No text is lost and its order never changes. Calls of functions and their results are text before they come here:
``mixtral_serve.text.tool_text``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["system", "user", "assistant", "tool"]

BLANK_LINE: Final = "\n\n"
NOTHING_TO_CONTINUE: Final = "there is no final assistant message to continue"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call that the model made earlier in the conversation."""

    name: str
    arguments: str
    """JSON, as the model wrote it and the client sent it back."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: Role
    content: str
    calls: tuple[FunctionCall, ...] = ()
    """Functions that the assistant called, after what it said."""
    tool_name: str = ""
    """The function whose result a message of the role "tool" brings."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a conversation becomes a prompt. The fields are the arguments of ``ChatEncoder.encode``."""

    tools: tuple[Mapping[str, object], ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def arranged(messages: Iterable[ChatMessage], *, system_role: bool) -> list[ChatMessage]:
    """The conversation as an optional system message followed by strictly alternating user and assistant.

    ``system_role`` says whether the template knows a system message. No message has calls or the role "tool".
    """
    turns: list[tuple[Role, list[str]]] = []
    for message in messages:
        role = message.role
        if role == "system" and turns and turns[-1][0] != "system":
            role = "user"  # only at the start does a system message stay one
        if turns and turns[-1][0] == role:
            turns[-1][1].append(message.content)
        else:
            turns.append((role, [message.content]))
    has_system = bool(turns) and turns[0][0] == "system"
    first = 1 if has_system else 0
    if has_system and (not system_role or len(turns) == 1):
        content = turns.pop(0)[1]
        if turns and turns[0][0] == "user":
            content += turns.pop(0)[1]
        turns.insert(0, ("user", content))
    elif len(turns) > first and turns[first][0] == "assistant":
        turns.insert(first, ("user", [""]))
    return [ChatMessage(role, BLANK_LINE.join(contents)) for role, contents in turns]
