"""Starting an engine process and holding its line, on asyncio.

Owns: ``EngineLaunch`` (what to start) and ``EngineProcess`` (one started process: its socket, its exit).

The child gets one end of a ``socketpair`` as an inherited file descriptor; its number is appended to the
command as ``--fd N``. Standard output and error are inherited, so the engine's log goes where ours goes.

Invariants: messages are handed on in order, and none after ``wait`` returned; ``wait`` returns when the process is
reaped *and* its last bytes were read; a process that closed its socket but does not end is killed.

Rejected: pipes on stdin and stdout (a stray write by any library would corrupt the stream), a Unix socket in
the file system (needs a path, permissions and cleaning up), ``multiprocessing`` (pickle, and a fork after
threads).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

import msgspec

from mixtral_serve.engine.messages import Inbox, Outbox, decode_outbox, encode
from mixtral_serve.engine.transport import FrameDecoder, FrameError, frame

_log = logging.getLogger(__name__)

_GRACE_S: Final = 5.0
"""How long a process may take to end after its socket ended, and the other way round."""


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """The command that starts an engine process."""

    argv: tuple[str, ...]
    """Program and arguments; ``--fd N`` is appended."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to our own environment."""


class EngineProcess(asyncio.Protocol):
    """One engine process."""

    def __init__(self, on_message: Callable[[Outbox], None]) -> None:
        self._on_message = on_message
        self._decoder = FrameDecoder()
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def spawn(cls, launch: EngineLaunch, on_message: Callable[[Outbox], None]) -> Self:
        """Start the process; ``on_message`` is called for each message it sends.

        Raises:
            OSError: the program cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            self = cls(on_message)
            self._process = await asyncio.create_subprocess_exec(
                *launch.argv,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **launch.env},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is for us; we decide about the engine
            )
            await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return self

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    def send(self, inbox: Inbox) -> None:
        """Queue one message; does nothing when the process is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(encode(inbox)))

    def kill(self) -> None:
        """SIGKILL. Nothing of an engine has to be saved."""
        self._signal(signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Have the engine print its stacks to standard error."""
        self._signal(signal.SIGUSR1)

    async def wait(self) -> int:
        """Wait for the end of process and socket. Returns the exit code, negative for a signal."""
        assert self._process is not None
        exited: asyncio.Future[int] = asyncio.ensure_future(self._process.wait())
        either: tuple[asyncio.Future[int] | asyncio.Future[None], ...] = (exited, self._closed)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({exited}, timeout=_GRACE_S)
            if not exited.done():
                _log.error("engine %d closed its socket and does not end: killed", self.pid)
                self.kill()
            exit_code = await exited
            await asyncio.wait({self._closed}, timeout=_GRACE_S)
        finally:
            exited.cancel()
            if self._transport is not None:
                self._transport.abort()
        return exit_code

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            messages = [decode_outbox(payload) for payload in self._decoder.feed(data)]
        except (FrameError, msgspec.MsgspecError):
            _log.exception("engine %d does not speak our protocol", self.pid)
            self._transport.abort()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whatever ended it, it ended
        if not self._closed.done():
            self._closed.set_result(None)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:  # it ended a moment ago
                return
