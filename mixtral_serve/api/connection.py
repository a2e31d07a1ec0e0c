"""One HTTP connection with deadlines: what uvicorn's protocol does not bound.

Owns: ``GuardedProtocol``, uvicorn's h11 protocol with two timers, and ``guarded_protocol``, which sets them.

* The client's turn: from the connection, or from the end of an answer, to the next complete request head, and for
  what is left of a body that nobody reads any more. Bounds half-sent heads, idle connections and endless bodies.
* The client's reading: an answer that finds the socket full and is not read for so long is aborted, which tells
  the route that its client has left.

It reads in small portions, so that no portion holds up the event loop, whatever is in it. An error that HTTP itself
raises (a bad request line, a head over the limit) is answered in the envelope.

h11 and not httptools, always: it bounds the head (64 KiB); httptools takes 32 MB of it.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixtral_serve.api.errors import INVALID_REQUEST, Problem
from mixtral_serve.api.middleware import REQUEST_ID_HEADER, new_request_id

_READ_BYTES: Final = 16_384
_BAD_HTTP: Final = Problem(
    400, INVALID_REQUEST, "invalid_http", "The request is not valid HTTP, or its head is too large."
)


class GuardedProtocol(H11Protocol):
    """uvicorn's connection, with deadlines for the client."""

    client_turn_s: ClassVar[float]
    stall_s: ClassVar[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turn: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # TCP only
        super().connection_made(transport)
        # asyncio reads 256 KiB at a time, which are 40,000 chunks of one byte and half a second of parsing.
        setattr(transport, "max_size", _READ_BYTES)  # noqa: B010 (an attribute of the selector transport alone)
        self._watch_turn()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._turn, self._stall):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_turn()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_turn()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP. ``msg`` is uvicorn's plain text, which the envelope replaces."""
        del msg
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = _BAD_HTTP.body()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            (REQUEST_ID_HEADER, new_request_id()),
        ]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_turn(self) -> None:
        """Run the timer exactly while it is the client who has to send something."""
        is_clients_turn = self.cycle is None or self.cycle.response_complete
        if not is_clients_turn:
            if self._turn is not None:
                self._turn.cancel()
                self._turn = None
        elif self._turn is None and not self.transport.is_closing():
            self._turn = self.loop.call_later(self.client_turn_s, self._end_turn)

    def _end_turn(self) -> None:
        self._turn = None
        if self.transport.get_write_buffer_size():
            self._watch_turn()  # it is still reading the last answer, which has a bound of its own
        else:
            self.transport.abort()


def guarded_protocol(*, client_turn_s: float, stall_s: float) -> type[asyncio.Protocol]:
    """A protocol class for ``uvicorn.Config(http=...)`` with these two bounds."""
    return type("BoundProtocol", (GuardedProtocol,), {"client_turn_s": client_turn_s, "stall_s": stall_s})
