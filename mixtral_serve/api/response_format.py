"""The shape of responses, whole and as events.

Owns: ``ResponseWriter``, which tells one response as it comes, and ``ResponseFacts``, what of it is known from the
start. An answer is one message, or calls of functions; each is an item that is added, grows and is done.

    created, in_progress
      output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done,
      output_item.done
      output_item.added, function_call_arguments.delta ..., function_call_arguments.done, output_item.done
    completed | incomplete | failed

Invariants: events are numbered from 0 without gaps; every item that was added is done before the end; the last event
carries the response as the whole answer would have it. A stream that fails ends with ``response.failed``; there
is no ``[DONE]``, as in the original.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from mixtral_serve.api.errors import Problem
from mixtral_serve.api.logprobs import TokenNames, chat_content
from mixtral_serve.api.sse import json_line
from mixtral_serve.api.tools import new_call_id
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.tool_calls import ArgumentsPiece, CallEvent, CallReader, CallStarted, TextPiece
from scheduler.events import TokenLogprob
from scheduler.lifecycle import FinishReason

_STATUS: Final = {FinishReason.STOP.value: "completed", FinishReason.LENGTH.value: "incomplete"}


@dataclass(frozen=True, slots=True)
class ResponseFacts:
    """What is known of a response before it begins."""

    id: str
    created_at: int
    """Unix time, seconds."""
    fields: Mapping[str, object]
    """The request's own parameters, as the response repeats them."""
    num_prompt_tokens: int
    has_logprobs: bool
    offers_tools: bool
    may_be_text: bool
    """Whether an answer of functions may also be text."""


@dataclass(slots=True)
class _Item:
    """An output item as far as it has come."""

    id: str
    index: int
    call: tuple[str, str] | None = None
    """Call id and name of a function's call; None for a message."""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[msgspec.Raw] = field(default_factory=list)

    def part(self) -> dict[str, object]:
        return {"type": "output_text", "text": "".join(self.pieces), "annotations": [], "logprobs": self.logprobs}

    def value(self, status: str) -> dict[str, object]:
        if self.call is not None:
            call_id, name = self.call
            arguments = "".join(self.pieces)
            head = {"id": self.id, "type": "function_call", "call_id": call_id, "name": name}
            return {**head, "arguments": arguments, "status": status}
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}


class ResponseWriter:
    """Tells one response: ``push`` each delta, then read ``response``."""

    def __init__(self, facts: ResponseFacts, names: TokenNames) -> None:
        self._facts = facts
        self._names = names
        self._reader = CallReader() if facts.offers_tools else None
        self._items: list[_Item] = []
        self._done: list[dict[str, object]] = []
        self._logprobs: list[TokenLogprob] = []
        self._last: Delta | None = None
        self._num_events = 0

    def push(self, delta: Delta, *, now: int) -> bytes:
        """The events of the next delta; ``now`` is Unix time."""
        opening = self._opening()
        self._logprobs.extend(delta.logprobs)
        data = opening + b"".join([self._tell(event) for event in self._read(delta)])
        if delta.finish_reason is None:
            return data
        self._last = delta
        is_message = not self._items or self._items[-1].call is None
        if is_message and (self._logprobs or not self._items):
            data += self._tell(TextPiece(""))  # an answer without a word is a message; last tokens may have no text
        data += self._finish_item(_STATUS[delta.finish_reason])
        response = self.response(now=now)
        return data + self._event(f"response.{response['status']}", response=response)

    def failed(self, problem: Problem) -> bytes:
        """The end of a stream that cannot go on."""
        begun = self._opening() + self._finish_item("incomplete")
        error = {"code": "server_error", "message": problem.message}
        return begun + self._event("response.failed", response=self._response("failed", error=error))

    def response(self, *, now: int) -> dict[str, object]:
        """The whole response, once the last delta was pushed."""
        last = self._last
        assert last is not None, "the response has ended"
        status = _STATUS[last.finish_reason or ""]
        num_in, num_out, num_cached = self._facts.num_prompt_tokens, last.num_output_tokens, last.num_cached_tokens
        return self._response(
            status,
            completed_at=now if status == "completed" else None,
            incomplete_details=None if status == "completed" else {"reason": "max_output_tokens"},
            usage={
                "input_tokens": num_in,
                "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
                "output_tokens": num_out,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_in + num_out,
            },
        )

    def _response(self, status: str, **more: object) -> dict[str, object]:
        return {
            "id": self._facts.id,
            "object": "response",
            "created_at": self._facts.created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "output": list(self._done),
            "usage": None,
            **self._facts.fields,
            **more,
        }

    def _opening(self) -> bytes:
        if self._num_events:
            return b""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _read(self, delta: Delta) -> Sequence[CallEvent]:
        reader = self._reader
        if reader is None:
            return [TextPiece(delta.text)] if delta.text else []
        events = reader.push(delta.text)
        if delta.finish_reason is not None:
            is_cut = delta.finish_reason != FinishReason.STOP.value or not self._facts.may_be_text
            events += reader.finish(cut_short=is_cut)
        return events

    def _tell(self, event: CallEvent) -> bytes:
        if isinstance(event, CallStarted):
            finished = self._finish_item("completed")
            item = _Item(f"fc_{secrets.token_hex(12)}", len(self._items), (new_call_id(), event.name))
            return finished + self._begin_item(item)
        if isinstance(event, ArgumentsPiece):
            item = self._items[-1]
            item.pieces.append(event.text)
            return self._of_item("response.function_call_arguments.delta", item, delta=event.text)
        begun = b""
        if not self._items:
            begun = self._begin_item(_Item(f"msg_{secrets.token_hex(12)}", 0))
        item = self._items[-1]
        logprobs = self._take_logprobs()
        item.pieces.append(event.text)
        item.logprobs += logprobs
        if not event.text and not logprobs:
            return begun
        return begun + self._of_part("response.output_text.delta", item, delta=event.text, logprobs=logprobs)

    def _take_logprobs(self) -> list[msgspec.Raw]:
        """Of the tokens since the last text, those that showed nothing included."""
        taken, self._logprobs = self._logprobs, []
        return chat_content(self._names, taken) if self._facts.has_logprobs else []

    def _begin_item(self, item: _Item) -> bytes:
        self._items.append(item)
        added = self._event("response.output_item.added", output_index=item.index, item=item.value("in_progress"))
        if item.call is not None:
            return added
        return added + self._of_part("response.content_part.added", item, part=item.part())

    def _finish_item(self, status: str) -> bytes:
        if len(self._done) == len(self._items):
            return b""
        item = self._items[-1]
        value = item.value(status)
        self._done.append(value)
        text = "".join(item.pieces)
        if item.call is not None:
            done = self._of_item("response.function_call_arguments.done", item, name=item.call[1], arguments=text)
        else:
            done = self._of_part("response.output_text.done", item, text=text, logprobs=item.logprobs)
            done += self._of_part("response.content_part.done", item, part=item.part())
        return done + self._event("response.output_item.done", output_index=item.index, item=value)

    def _of_item(self, kind: str, item: _Item, **fields: object) -> bytes:
        return self._event(kind, item_id=item.id, output_index=item.index, **fields)

    def _of_part(self, kind: str, item: _Item, **fields: object) -> bytes:
        return self._of_item(kind, item, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_line(data))
