"""A small HTTP/1.1 client for measuring: one request per connection, the answer's body handed on as it arrives.

Owns: ``ResponseParser`` (sans-IO), ``Target`` (where to) and ``exchange`` (one request and its answer).

A load generator shares the machine with the server that it measures, so what it costs is part of every figure.
Bytes are handed on from the event loop's read callback, without a task switch per chunk.

Invariants: the body does not depend on how the bytes were cut; an answer counts as complete only when its own
framing says so; every failure is an ``ExchangeError``.

Rejected: httpx (some ten times the CPU per chunk), ``asyncio.open_connection`` (a future and a task switch per chunk),
keep-alive (it hides what connecting costs, and a client under test conditions rarely has a warm connection).
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

_MAX_HEAD_BYTES: Final = 64 << 10
_MAX_SIZE_LINE_BYTES: Final = 1 << 10


class ExchangeError(Exception):
    """No complete answer. ``kind`` is the word that reports count it under."""

    kind = "exchange"


class CannotConnect(ExchangeError):
    """The server does not take the connection."""

    kind = "connect"


class ConnectionLost(ExchangeError):
    """The connection ended before the answer did."""

    kind = "connection_lost"


class NotHttp(ExchangeError):
    """The answer is not HTTP/1.1 as it should be."""

    kind = "malformed"


class TooSlow(ExchangeError):
    """The answer was not complete in time."""

    kind = "timeout"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    path: str
    """Prefix of every path, without a slash at the end."""
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, base_url: str) -> Target:
        """From ``http://host:port``; a trailing ``/v1`` is dropped, since the paths carry it.

        Raises:
            ValueError: not an http or https URL.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not an http:// or https:// URL")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        tls = ssl.create_default_context() if is_tls else None
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), path, tls)

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine for certain: ``localhost`` or a loopback address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
        """A request, ready to be sent."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Connection: close",
            "Accept: text/event-stream, application/json",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
        ]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@dataclass(slots=True)
class ResponseParser:
    """One HTTP/1.1 answer: ``feed`` it, ``end`` it. Trailers are skipped; interim (1xx) answers are, too."""

    status: int = 0
    """0 until the head is complete."""
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case; the last of equal names."""
    is_complete: bool = False
    _buffer: bytearray = field(default_factory=bytearray)
    _left: int | None = None
    """Bytes left of the body or of the current chunk. None: the body ends with the connection, or the next chunk's
    size is not known yet; 0 in a chunked body: the last chunk was read."""
    _is_chunked: bool = False
    _wants_line_break: bool = False
    """The line break after a chunk has not been seen."""

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body in ``data``.

        Raises:
            NotHttp: this is not an answer.
        """
        self._buffer += data
        pieces: list[bytes] = []
        if not self.status and not self._read_head():
            return pieces
        if self._is_chunked:
            self._read_chunks(pieces)
        elif not self.is_complete:
            self._read_plain(pieces)
        return pieces

    def end(self) -> None:
        """The connection has ended.

        Raises:
            ConnectionLost: in the midst of the answer.
        """
        if self.status and self._left is None and not self._is_chunked:
            self.is_complete = True
        if not self.is_complete:
            raise ConnectionLost("the connection ended in the midst of the answer" if self.status else "no answer came")

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise NotHttp("the answer's head does not end")
            return False
        status_line, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = status_line.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdecimal():
            raise NotHttp("the answer does not begin as HTTP does")
        status = int(rest[:3])
        if status < 200:
            return self._read_head()
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.status = status
        self._is_chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if not self._is_chunked and length is not None:
            if not length.isdecimal():
                raise NotHttp("the answer's length is not a number")
            self._left = int(length)
        if status in (204, 304):
            self._left = 0
        self.is_complete = self._left == 0 and not self._is_chunked
        return True

    def _read_plain(self, pieces: list[bytes]) -> None:
        piece = bytes(self._buffer if self._left is None else self._buffer[: self._left])
        self._buffer.clear()
        if piece:
            pieces.append(piece)
        if self._left is not None:
            self._left -= len(piece)
            self.is_complete = self._left == 0

    def _read_chunks(self, pieces: list[bytes]) -> None:
        buffer = self._buffer
        while not self.is_complete:
            if self._left:
                piece = bytes(buffer[: self._left])
                if not piece:
                    return
                pieces.append(piece)
                del buffer[: len(piece)]
                self._left -= len(piece)
                self._wants_line_break = not self._left
                continue
            end = buffer.find(b"\r\n")
            if end < 0:
                if len(buffer) > _MAX_SIZE_LINE_BYTES:
                    raise NotHttp("a chunk's size does not end")
                return
            line = bytes(buffer[:end])
            del buffer[: end + 2]
            self._read_size(line)

    def _read_size(self, line: bytes) -> None:
        if self._wants_line_break:
            if line:
                raise NotHttp("a chunk is longer than it said")
            self._wants_line_break = False
            self._left = None
        elif self._left == 0:
            # After the last chunk: trailers up to an empty line.
            self.is_complete = not line
        else:
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                raise NotHttp("a chunk's size is not a number") from None
            if size < 0:
                raise NotHttp("a chunk's size is negative")
            self._left = size


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: Mapping[str, str]


OnBody = Callable[[int, bytes], None]
"""Called with the status and a piece of the body, from the read callback. What it raises ends the exchange."""


class _Exchange(asyncio.Protocol):
    """Sends one request and feeds the answer to a parser."""

    def __init__(self, request: bytes, on_body: OnBody, done: asyncio.Future[None]) -> None:
        self._request = request
        self._on_body = on_body
        self._done = done
        self._transport: asyncio.BaseTransport | None = None
        self.parser = ResponseParser()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._done.done():
            return
        try:
            for piece in self.parser.feed(data):
                self._on_body(self.parser.status, piece)
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits the exchange
            self._done.set_exception(error)
        else:
            if self.parser.is_complete:
                self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done.done():
            return
        try:
            if exc is not None:
                raise ConnectionLost("the connection was reset") from exc
            self.parser.end()
        except ExchangeError as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)


async def exchange(target: Target, request: bytes, on_body: OnBody, *, timeout_s: float) -> Head:
    """Send ``request`` on a connection of its own and wait for the end of the answer.

    Raises:
        ExchangeError: no complete answer within ``timeout_s`` seconds.
        Exception: whatever ``on_body`` raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    transport: asyncio.Transport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            try:
                transport, protocol = await loop.create_connection(
                    lambda: _Exchange(request, on_body, done),
                    target.host,
                    target.port,
                    ssl=target.tls,
                )
            except OSError as error:
                raise CannotConnect(f"cannot connect: {error.strerror or error}") from error
            await done
    except TimeoutError:
        raise TooSlow(f"the answer was not complete after {timeout_s:g} s") from None
    finally:
        if transport is not None:
            transport.abort()
    return Head(protocol.parser.status, protocol.parser.headers)
