"""Server-sent events: a stream of ready-made bytes as an ASGI response.

Owns: the framing (``event``, ``DONE``), ``json_line``, ``KeepAlive`` and ``EventStream``.

Invariants: nothing is sent before the first event exists, so that whatever fails until then is answered with a
true status; after it, a failure is one ``error`` event and the end of the stream, without ``[DONE]``. The one exception
is a prompt that takes long: a silence of ``KeepAlive.every_s`` is broken by a comment, which also begins the answer,
so that no proxy takes a busy server for a dead one. When the client leaves, the work behind the stream is cancelled at
once. One ``send`` per event; one task for the stream, one for the watch and one for the comments, none per event.

Rejected: Starlette's ``StreamingResponse``, which answers 200 before the work has begun.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mixtral_serve.api.errors import UNEXPECTED, ClientDisconnected, Problem, describe
from mixtral_serve.api.responses import until_disconnect

_log = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
COMMENT: Final = b": keep-alive\n\n"
"""What every reader of events passes over."""
_encode: Final = msgspec.json.Encoder().encode
_LINE_BREAKS: Final = tuple(
    (character.encode(), b"\\u%04x" % ord(character)) for character in ("\x85", "\u2028", "\u2029")
)


def json_line(value: object) -> bytes:
    """``value`` as JSON without anything that some client takes for the end of a line."""
    data = _encode(value)
    if not data.isascii():
        for character, escaped in _LINE_BREAKS:
            if character in data:
                data = data.replace(character, escaped)
    return data


def event(data: bytes) -> bytes:
    """One event; ``data`` has no line break."""
    return b"data: " + data + b"\n\n"


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """When silence is broken."""

    every_s: float = 0.0
    """A stream is never silent for longer; 0: it may be."""
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class _Wire:
    """The answer as it is sent. Two tasks send; each message goes out whole, the head before all others."""

    def __init__(self, send: Send, start: Message) -> None:
        self._send = send
        self._start = start
        self._lock = asyncio.Lock()
        self.is_started = False
        self.num_sent = 0

    async def write(self, data: bytes, *, more: bool = True) -> None:
        async with self._lock:
            # A sender that is cancelled while it waits has sent nothing, and nothing is noted of it.
            if not self.is_started:
                await self._send(self._start)
                self.is_started = True
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self.num_sent += 1


class EventStream(Response):
    """Sends each item of ``events``, which frames itself, as soon as it is there."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_close: Callable[[], None],
        headers: dict[str, str],
        keep_alive: KeepAlive = KeepAlive(),
        to_event: Callable[[Problem], bytes] = lambda problem: event(problem.body()),
    ) -> None:
        """``on_close`` is called exactly once, however the stream ends. ``to_event`` spells a failure midway."""
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # proxies that hold streams back are told not to
        self._events = events
        self._on_close = on_close
        self._keep_alive = keep_alive
        self._to_event = to_event

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises what happens before the first event."""
        try:
            await until_disconnect(receive, self._deliver(send))
        except ClientDisconnected:
            return
        finally:
            self._on_close()

    async def _deliver(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        wire = _Wire(send, start)
        comments = asyncio.create_task(self._comment(wire)) if self._keep_alive.every_s > 0 else None
        try:
            await self._tell(wire)
        finally:
            if comments is not None:
                comments.cancel()
                await asyncio.gather(comments, return_exceptions=True)
        await wire.write(b"", more=False)

    async def _tell(self, wire: _Wire) -> None:
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await wire.write(data)
            except Exception as error:
                if not wire.is_started:
                    raise
                problem = describe(error)
                # Only what nobody raised on purpose needs its traceback.
                unexpected = error if problem.code == UNEXPECTED else None
                _log.warning("a stream was cut by an error: %s", type(error).__name__, exc_info=unexpected)
                await wire.write(self._to_event(problem))

    async def _comment(self, wire: _Wire) -> None:
        """Look twice in ``every_s``; a comment follows where nothing was sent between two looks."""
        while True:
            num_sent = wire.num_sent
            await self._keep_alive.pause(self._keep_alive.every_s / 2)
            if wire.num_sent == num_sent:
                await wire.write(COMMENT)
