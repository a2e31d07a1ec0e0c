"""A small server with OpenAI's completions API that misbehaves as told, on a real loopback socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return chunked(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")


def text_event(text: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None})


class FakeServer:
    """Answers completions; ``behaviour`` says how: by request number, or the same for all."""

    def __init__(self, behaviour: str | dict[int, str] = "right") -> None:
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.arrivals_s: list[float] = []
        self.num_open = 0
        self.most_open = 0
        self.base_url = ""
        self.released = asyncio.Event()

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            self._plain(writer, 200, {"object": "list", "data": [{"id": "fake-model"}, {"id": "other"}]})
        else:
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            self.authorizations.append(fields.get("Authorization"))
            self.bodies.append(json.loads(await reader.readexactly(int(fields["Content-Length"]))))
            self.arrivals_s.append(time.monotonic())
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            await self._complete(reader, writer, len(self.bodies) - 1)
            self.num_open -= 1
        writer.close()

    async def _complete(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        how = self.behaviour if isinstance(self.behaviour, str) else self.behaviour.get(number, "right")
        num_tokens = self.bodies[number]["max_tokens"]
        if how == "busy":
            self._plain(writer, 429, {"error": {"message": "too many", "code": "rate_limit_exceeded"}})
            return
        if how == "silent":
            await reader.read()  # until the client leaves
            return
        if how == "held":
            await self.released.wait()
        writer.write(SSE_HEAD)
        if how == "garbage":
            writer.write(event(b"not json") + chunked(b""))
            return
        for i in range(num_tokens):
            last = i == num_tokens - 1 and how != "unfinished"
            writer.write(text_event("" if how == "mute" else "x", "length" if last else None))
            await writer.drain()
            if how == "error_event" and i == 1:
                writer.write(
                    event({"error": {"message": "the model failed", "code": "generation_failed"}}) + chunked(b"")
                )
                return
            if how == "cut" and i == 1:
                return
        count = num_tokens - 1 if how == "short" else num_tokens
        if how != "no_usage":
            usage = {"completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 16}}
            writer.write(event({"choices": [], "usage": usage}))
        if how != "no_done":
            writer.write(event(b"[DONE]"))
        writer.write(chunked(b""))

    def _plain(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))


@pytest.fixture
def serving() -> Callable[..., Any]:
    """``async with serving(behaviour) as server``: listens on a free port of the loopback interface."""

    @asynccontextmanager
    async def opened(behaviour: str | dict[int, str] = "right") -> AsyncIterator[FakeServer]:
        fake = FakeServer(behaviour)
        server = await asyncio.start_server(fake.on_connection, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        fake.base_url = f"http://{host}:{port}"
        try:
            yield fake
        finally:
            server.close()
            await server.wait_closed()

    return opened


@pytest.fixture
def run_async() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a coroutine on a fresh event loop, within two minutes."""

    def run_it(coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run(asyncio.wait_for(coroutine, 120.0))

    return run_it
