"""Conversations as clients send them, and as Mixtral's templates want them.

Owns: ``ChatMessage`` and ``arranged``. Mixtral's templates demand user, assistant, user, assistant, ...; the
OpenAI API allows any order of roles. ``arranged`` closes the gap, so that no ordinary conversation fails:

* neighbours of the same role become one message, joined by a blank line;
* system messages at the start stay one system message, or, for templates without that role, go in front of the
  first user message; later ones speak with the user's voice where they stand;
* a conversation that starts with the assistant gets an empty user message before it.

No text is lost and its order never changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["system", "user", "assistant"]

BLANK_LINE: Final = "\n\n"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: Role
    content: str


def arranged(messages: Iterable[ChatMessage], *, system_role: bool) -> list[ChatMessage]:
    """The conversation as an optional system message followed by strictly alternating user and assistant.

    ``system_role`` says whether the template knows a system message.
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
