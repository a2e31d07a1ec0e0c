"""Functions that a chat request offers: what constrains the answer, and how calls are told.

Owns: ``ToolUse``, what a request makes of its tools, and ``ToolSpeech``, which turns an answer's text into OpenAI's
``tool_calls``, whole or streamed.

In a stream a call's first ``delta`` has its index, id and name, and empty arguments; the arguments follow in pieces as
the model writes them. Each choice has ids of its own. How an answer ends:

* ``tool_calls`` where the model chose to call (``auto``, ``required``) and all its calls are complete;
* ``stop`` where the function was named by the request, as OpenAI says it, and where the answer is text;
* ``length`` where the tokens ran out. The calls that had begun are told as far as they came, so the last one's
  arguments may not parse; a beginning that could still have become a call or a text is not told.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mixtral_serve.api.convert import Choice
from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.chat import ChatRequest
from mixtral_serve.api.sse import json_line
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar_limits import check_schema
from mixtral_serve.text.tool_calls import ArgumentsPiece, CallEvent, CallReader, CallStarted, TextPiece
from mixtral_serve.text.tool_grammar import CallableFunction, tool_grammar
from scheduler.lifecycle import FinishReason

_STOP: Final = FinishReason.STOP.value


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request asks for that offers tools."""

    functions: tuple[CallableFunction, ...]
    """Those that may be called."""
    places: tuple[int, ...]
    """Which of the request's tools each of them is."""
    text_allowed: bool
    is_named: bool
    """The request names the function: there is exactly one call."""
    parallel: bool
    answer_schema: Mapping[str, Any] | None = None
    """What an answer in text must validate against; None: any text."""

    @classmethod
    def of(cls, request: ChatRequest) -> ToolUse | None:
        """None where no tools are offered. The request was checked."""
        if not request.offers_tools:
            return None
        choice = request.tool_choice
        allowed, mode = {tool.function.name for tool in request.tools}, "auto"
        if choice is not None:
            mode = choice.type
            if choice.function is not None:
                allowed = {choice.function.name}
            elif choice.allowed_tools is not None:
                allowed, mode = {tool.function.name for tool in choice.allowed_tools.tools}, choice.allowed_tools.mode
        places = [place for place, tool in enumerate(request.tools) if tool.function.name in allowed]
        functions = [request.tools[place].function for place in places]
        return cls(
            functions=tuple(CallableFunction(each.name, each.schema_of_arguments()) for each in functions),
            places=tuple(places),
            text_allowed=mode == "auto",
            is_named=mode == "function",
            parallel=request.parallel_tool_calls and mode != "function",
            answer_schema=request.schema_of_text,
        )

    def grammar(self) -> str:
        """What the answer must match, after the space that a chat answer begins with.

        Raises:
            GrammarError: all parameters together are too large.
            InvalidRequest: those of one function cannot be kept.
        """
        for place, function in zip(self.places, self.functions, strict=True):
            try:
                check_schema(function.parameters)
            except GrammarError as error:
                raise _refused(f"tools[{place}].function.parameters", error) from None
        if self.answer_schema is not None:
            try:
                check_schema(self.answer_schema)
            except GrammarError as error:
                raise _refused("response_format.json_schema.schema", error) from None
        return tool_grammar(
            self.functions,
            parallel=self.parallel,
            text_allowed=self.text_allowed,
            answer_schema=self.answer_schema,
        )


def _refused(param: str, error: GrammarError) -> InvalidRequest:
    return InvalidRequest(f"'{param}': {error}.", param=param, code="invalid_value")


def new_call_id() -> str:
    """An id for a call: unique, and of a form that clients know."""
    return f"call_{secrets.token_hex(12)}"


class ToolSpeech:
    """A ``Speech`` in which text may be calls."""

    opening = b'{"role":"assistant","content":null}'
    silence = b"{}"

    def __init__(self, use: ToolUse, *, new_id: Callable[[], str] = new_call_id) -> None:
        self._use = use
        self._new_id = new_id
        self._readers: dict[int, CallReader] = {}

    def parts(self, index: int, delta: Delta) -> list[bytes]:
        """See ``Speech``."""
        reader = self._readers.setdefault(index, CallReader())
        events = reader.push(delta.text)
        if delta.finish_reason is not None:
            events += reader.finish(cut_short=self._is_cut_short(delta.finish_reason))
        return [self._part(event) for event in events]

    def ending(self, index: int, reason: str) -> str:
        """See ``Speech``."""
        return self._reason(self._readers[index], reason)

    def message(self, choice: Choice) -> tuple[dict[str, object], str | None]:
        """See ``Speech``."""
        reason = choice.finish_reason or ""
        reader = CallReader()
        events = reader.push(choice.text) + reader.finish(cut_short=self._is_cut_short(reason))
        content = "".join([event.text for event in events if isinstance(event, TextPiece)])
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if reader.has_calls else content,
            "refusal": None,
        }
        calls = self._calls(events)
        if calls:
            message["tool_calls"] = calls
        return message, self._reason(reader, reason)

    def _calls(self, events: list[CallEvent]) -> list[dict[str, object]]:
        arguments: list[list[str]] = []
        names: list[str] = []
        for event in events:
            if isinstance(event, CallStarted):
                names.append(event.name)
                arguments.append([])
            elif isinstance(event, ArgumentsPiece):
                arguments[event.index].append(event.text)
        return [
            {"id": self._new_id(), "type": "function", "function": {"name": name, "arguments": "".join(pieces)}}
            for name, pieces in zip(names, arguments, strict=True)
        ]

    def _part(self, event: CallEvent) -> bytes:
        if isinstance(event, TextPiece):
            return b'{"content":%b}' % json_line(event.text)
        call: dict[str, object] = {"index": event.index}
        if isinstance(event, CallStarted):
            call |= {"id": self._new_id(), "type": "function", "function": {"name": event.name, "arguments": ""}}
        else:
            call["function"] = {"arguments": event.text}
        return b'{"tool_calls":[%b]}' % json_line(call)

    def _is_cut_short(self, reason: str) -> bool:
        return reason != _STOP or not self._use.text_allowed

    def _reason(self, reader: CallReader, reason: str) -> str:
        is_call = reason == _STOP and reader.is_complete and not self._use.is_named
        return "tool_calls" if is_call else reason
