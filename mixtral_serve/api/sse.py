"""Server-sent events: a stream of ready-made bytes as an ASGI response.

Owns: the framing (``event``, ``DONE``), ``json_line``, and ``EventStream``.

Invariants: nothing is sent before the first event exists, so that whatever fails until then is answered with a
true status; after it, a failure is one ``error`` event and the end of the stream, without ``[DONE]``. When the
client leaves, the work behind the stream is cancelled at once. One ``send`` per event; one task for the stream
and one for the watch, none per event.

Rejected: Starlette's ``StreamingResponse``, which answers 200 before the work has begun.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixtral_serve.api.errors import ClientDisconnected, describe
from mixtral_serve.api.responses import until_disconnect

_log = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
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


class EventStream(Response):
    """Sends each item of ``events``, which frames itself, as soon as it is there."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, on_close: Callable[[], None], headers: dict[str, str]
    ) -> None:
        """``on_close`` is called exactly once, however the stream ends."""
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"  # proxies that hold streams back are told not to
        self._events = events
        self._on_close = on_close

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises what happens before the first event."""
        try:
            await until_disconnect(receive, self._deliver(send))
        except ClientDisconnected:
            return
        finally:
            self._on_close()

    async def _deliver(self, send: Send) -> None:
        is_started = False
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    if not is_started:
                        is_started = True
                        await self._start(send)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                if not is_started:
                    raise
                _log.warning("a stream was cut by an error: %s", type(error).__name__)
                data = event(describe(error).body())
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
