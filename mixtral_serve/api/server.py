"""The server process: a socket, uvicorn, the engine's life and an orderly end.

Owns: ``serve`` and ``ServerSettings``. The end, on SIGTERM or SIGINT: ``/readyz`` says 503 and new requests are
refused with 503 and Retry-After, over a socket that stays open; what runs may finish for ``drain_s``; what is left
ends with an error event; the engine is stopped; the sockets are closed; ``serve`` returns 0. A second signal
ends everything at once.

Rejected: uvicorn's own signal handling, which closes the socket first and cuts streams without a word.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from mixtral_serve.api.connection import guarded_protocol
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.errors import EngineStartError, EngineUnavailable

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 65_536
_SEND_BUFFER_BYTES: Final = 131_072
"""What the kernel may hold of an answer for a slow reader, instead of megabytes."""
_CLOSING_S: Final = 3.0
"""For the last bytes of answers to leave, after everything has ended."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where to listen, and how patient to be."""

    host: str = "127.0.0.1"
    port: int = 11400
    """0 takes a free one."""
    drain_s: float = 30.0
    client_turn_s: float = 30.0
    """For a client to send the next request's head."""
    stall_s: float = 60.0
    """For a client that does not read its answer."""


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def bind(settings: ServerSettings) -> socket.socket:
    """The listening socket.

    Raises:
        OSError: the address is taken, or not ours.
    """
    family, kind, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # inherited by connections
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


async def serve(
    app: ASGIApp,
    engine: EngineClient,
    settings: ServerSettings,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[ModelInfo], None] = lambda _: None,
) -> int:
    """Start the engine, serve until a signal or until the engine cannot start, and end in order.

    ``listener`` is a socket from ``bind`` (made here by default). ``on_ready`` is called when the engine takes
    requests. Returns the exit code of the process: 0, or the engine's when it cannot start as configured.

    Raises:
        OSError: the address cannot be bound.
    """
    listener = listener or bind(settings)
    server = _Uvicorn(_config(app, settings))
    stop = _StopSignal(engine)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, _log.info, "SIGHUP: there is nothing to reload")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(_started(engine, on_ready))
    try:
        await asyncio.wait((serving, stopping, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.result():
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        await engine.stop(0.0 if stop.is_urgent or not stop.is_asked else settings.drain_s)
        server.should_exit = True
        server.force_exit = stop.is_urgent
        await serving
        return starting.result() if starting.done() else 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
        for task in (stopping, starting):
            task.cancel()
        await asyncio.gather(stopping, starting, return_exceptions=True)


def _config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=guarded_protocol(client_turn_s=settings.client_turn_s, stall_s=settings.stall_s),
        ws="none",
        loop="none",
        lifespan="off",
        interface="asgi3",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=max(1, round(settings.client_turn_s)),
        timeout_graceful_shutdown=round(_CLOSING_S),
        backlog=2048,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
    )


async def _started(engine: EngineClient, on_ready: Callable[[ModelInfo], None]) -> int:
    """Start the engine and wait for it. Returns 0, or the exit code of a start that cannot succeed."""
    await engine.start()
    try:
        on_ready(await engine.wait_ready())
    except EngineStartError as error:
        _log.critical("%s", error.message)
        return error.exit_code
    except EngineUnavailable:
        return 0  # it was stopped before it was ready
    return 0


class _StopSignal:
    """What the signals have asked for so far."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._asked = asyncio.Event()
        self.is_urgent = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        await self._asked.wait()

    def on_signal(self, number: signal.Signals) -> None:
        """The first signal asks for an orderly end, the second for one at once."""
        if not self.is_asked:
            _log.info("%s: finishing what runs; once more to end at once", number.name)
            self._asked.set()
            return
        _log.warning("%s: ending at once", number.name)
        self.is_urgent = True
        # The drain that is under way is cut short, and a step that computes is not waited for.
        self._ending = asyncio.ensure_future(self._engine.stop(0.0))
        pid = self._engine.engine_pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
