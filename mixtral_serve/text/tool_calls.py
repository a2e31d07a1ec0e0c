"""From the text of an answer to the calls in it, piece by piece.

Owns: ``CallReader``, a sans-IO parser of the form that ``tool_grammar`` demands, and its events. It decides as early as
possible: at the first character that no call begins with, an answer is text; once ``[{"name": "`` is complete it is
calls, and nothing of it is ever text. Until then nothing comes out.

Invariant: the events, text and arguments joined, do not depend on how the answer was cut into pieces; the arguments
joined are exactly what the model wrote between ``"arguments": `` and the end of the object.

Rejected: collecting the answer and parsing it as JSON at its end. A stream would then be silent until the last call is
complete, and an answer that was cut short would have no calls at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias

from mixtral_serve.text.errors import MalformedCallError
from mixtral_serve.text.tool_grammar import ARGUMENTS, CLOSING, NEXT, OPENING

_STRUCTURE: Final = re.compile(r'["{}\[\]]')
_IN_STRING: Final = re.compile(r'["\\]')
_AFTER_CALL: Final = ("}" + CLOSING, "}" + NEXT)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of an answer that is text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call has begun; its arguments follow."""

    index: int
    """Counts the answer's calls from 0."""
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """More of a call's arguments."""

    index: int
    text: str


CallEvent: TypeAlias = TextPiece | CallStarted | ArgumentsPiece


class _State(Enum):
    OPEN = auto()
    """It may become a call or, where that is allowed, text."""
    TEXT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    AFTER_CALL = auto()
    END = auto()


class CallReader:
    """Reads one answer."""

    __slots__ = ("_depth", "_escaped", "_held", "_in_string", "_index", "_state")

    def __init__(self) -> None:
        self._state = _State.OPEN
        self._held = ""
        self._index = -1
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def has_calls(self) -> bool:
        """Whether the answer consists of calls, complete or not."""
        return self._state not in (_State.OPEN, _State.TEXT)

    @property
    def is_complete(self) -> bool:
        """Whether the answer consists of calls and all of them are there to the end."""
        return self._state is _State.END

    def push(self, text: str) -> list[CallEvent]:
        """What the next piece of the answer tells.

        Raises:
            MalformedCallError: the answer has another form.
        """
        if self._state is _State.TEXT:
            return [TextPiece(text)] if text else []
        self._held += text
        return list(self._read())

    def finish(self, *, cut_short: bool) -> list[CallEvent]:
        """The answer is over. An undecided beginning is text, unless it was ``cut_short`` and may have been a call."""
        held, self._held = self._held, ""
        if self._state is _State.OPEN and held and not cut_short:
            self._state = _State.TEXT
            return [TextPiece(held)]
        return []

    def _read(self) -> Iterator[CallEvent]:
        """Go on until what is held does not suffice for the next step."""
        step = {
            _State.OPEN: self._open,
            _State.NAME: self._name,
            _State.ARGUMENTS: self._arguments,
            _State.AFTER_CALL: self._after_call,
        }
        while self._held and self._state in step:
            before = self._state
            yield from step[self._state]()
            if self._state is before:
                return
        if self._state is _State.END and self._held:
            raise MalformedCallError("something follows the calls")

    def _open(self) -> Iterator[CallEvent]:
        if self._held.startswith(OPENING):
            self._go(_State.NAME, len(OPENING))
        elif not OPENING.startswith(self._held):
            self._state = _State.TEXT
            held, self._held = self._held, ""
            yield TextPiece(held)

    def _name(self) -> Iterator[CallEvent]:
        name, quote, _ = self._held.partition('"')
        after = self._held[len(name) :]
        if after.startswith(ARGUMENTS):
            self._index += 1
            self._depth = 0
            self._go(_State.ARGUMENTS, len(name) + len(ARGUMENTS))
            yield CallStarted(self._index, name)
        elif quote and not ARGUMENTS.startswith(after):
            raise MalformedCallError("a call has no arguments")

    def _arguments(self) -> Iterator[CallEvent]:
        end = self._end_of_value()
        if end:
            piece = self._held[:end]
            self._go(_State.ARGUMENTS if self._depth else _State.AFTER_CALL, end)
            yield ArgumentsPiece(self._index, piece)

    def _end_of_value(self) -> int:
        """How much of what is held belongs to the arguments: they end where their first brace is closed."""
        at, held = 0, self._held
        if not self._depth and held[0] != "{":
            raise MalformedCallError("arguments are no object")
        while at < len(held):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._in_string else _STRUCTURE).search(held, at)
            if found is None:
                return len(held)
            at = found.end()
            character = found.group()
            if character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return at
        return at

    def _after_call(self) -> Iterator[CallEvent]:
        closed, next_call = _AFTER_CALL
        if self._held.startswith(closed):
            self._go(_State.END, len(closed))
        elif self._held.startswith(next_call):
            self._go(_State.NAME, len(next_call))
        elif not (closed.startswith(self._held) or next_call.startswith(self._held)):
            raise MalformedCallError("a call is followed by something else")
        yield from ()

    def _go(self, state: _State, num_read: int) -> None:
        self._state = state
        self._held = self._held[num_read:]
