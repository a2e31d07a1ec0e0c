"""What happens to every exchange, whatever its route: pure ASGI, no buffering.

Owns: ``Envelope``, the outermost layer. It gives each exchange an id made by the server, adds the headers that
every answer carries, and turns what the framework lets through into an error in the envelope. And
``BodyLimits``, which bounds the size, the type and the time of a request's body while it is read, so that no
route can forget to.

Invariants: the id is never taken from the client; a client's ``X-Request-Id`` is only given back, cleaned, in
``x-client-request-id``. A body is counted as it comes, so a chunked or lying one stops at the limit.

Rejected: ``BaseHTTPMiddleware``, which puts a queue without bounds between a stream and its reader.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import MutableMapping
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral_serve.api.errors import BodyTimeout, BodyTooLarge, UnsupportedMediaType, describe
from mixtral_serve.api.responses import problem_response

_log = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "x-request-id"
CLIENT_ID_HEADER: Final = "x-client-request-id"
_MAX_CLIENT_ID_CHARS: Final = 64
_NOT_IN_CLIENT_ID: Final = re.compile(r"[^A-Za-z0-9_.\-]")


def new_request_id() -> str:
    """An id for one exchange; unguessable, so that it can name things."""
    return f"req_{secrets.token_hex(16)}"


class Envelope:
    """Ids, headers and last-resort errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        extra = _extra_headers(request_id, Headers(scope=scope))
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in extra:
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            _log.exception("request %s failed", request_id)
            if started:
                raise  # the status is sent: all that is left is to cut the connection
            await problem_response(describe(error))(scope, receive, send_with_headers)


def _extra_headers(request_id: str, headers: Headers) -> tuple[tuple[str, str], ...]:
    always = (
        (REQUEST_ID_HEADER, request_id),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
    )
    client_id = headers.get(REQUEST_ID_HEADER) or headers.get(CLIENT_ID_HEADER)
    if not client_id:
        return always
    return (*always, (CLIENT_ID_HEADER, _NOT_IN_CLIENT_ID.sub("", client_id[:_MAX_CLIENT_ID_CHARS])))


class BodyLimits:
    """Bounds on the bodies of requests: media type, size and time."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, self._bounded(Headers(scope=scope), receive), send)

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` for one exchange. Raises in the route that reads the body, which answers with the error."""
        num_bytes = 0
        complete = False
        deadline: float | None = None

        async def bounded_receive() -> Message:
            nonlocal num_bytes, complete, deadline
            if complete:
                return await receive()  # waiting for the client to leave takes as long as it takes
            loop = asyncio.get_running_loop()
            if deadline is None:
                deadline = loop.time() + self._timeout_s
                _check_headers(headers, self._max_bytes)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise BodyTooLarge(self._max_bytes)
                complete = not message.get("more_body", False)
            return message

        return bounded_receive


def _check_headers(headers: Headers, max_bytes: int) -> None:
    """What can be refused before a byte of the body was read."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:19]) > max_bytes:
        raise BodyTooLarge(max_bytes)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("The body must be JSON, with 'Content-Type: application/json'.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed.")
