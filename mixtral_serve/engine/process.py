"""The engine process: one loop around an ``EngineCore`` and a socket.

Owns: the process's life from "load" to its exit code, its signal handling, and the loop.

The loop: take what the socket has (waiting only when there is nothing to do), hand it to the core, tick, send
one frame. The engine never waits for its reader: what the socket does not take stays in the out-buffer, which
the admitted tokens bound.

How it ends: 0 after ``Shutdown`` or when the API process is gone (end of the socket; the kernel also kills it
then, in case it is busy or loading); the code that was reported when it cannot start as configured; 70 when
the runner keeps failing; and with a traceback when the scheduler contradicts itself. SIGINT and SIGTERM are
ignored: the API process decides when the engine ends. SIGUSR1 prints all stacks to standard error.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from mixtral_serve.contract import Runner
from mixtral_serve.engine.core import EngineCore, model_info
from mixtral_serve.engine.errors import EXIT_CONFIG, EngineStartError
from mixtral_serve.engine.memory import MemoryWatch
from mixtral_serve.engine.messages import Failed, Outbox, Ready, decode_inbox, encode
from mixtral_serve.engine.transport import EngineSocket
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.errors import ConfigError, PlanError
from scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)

EXIT_BROKEN: Final = 70
"""The runner failed in too many steps in a row (``EX_SOFTWARE``); a fresh process may help."""

_FAREWELL_S: Final = 2.0
"""How long the last message may take to be read before the process ends without it."""
_PR_SET_PDEATHSIG: Final = 1


class EngineParts(NamedTuple):
    """What an engine is made of."""

    runner: Runner
    scheduler: Scheduler
    token_bytes: TokenBytes
    memory: MemoryWatch | None = None


def run_engine(
    sock: socket.socket, build: Callable[[], EngineParts], *, clock: Callable[[], float] = time.monotonic
) -> int:
    """Build the engine, serve until told otherwise, and return the exit code. Meant for a process of its own.

    ``build`` loads the model. It raises ``EngineStartError`` (or the scheduler's ``ConfigError`` or
    ``PlanError``) where a restart would not help; anything else it raises ends the process and is tried again.
    """
    _obey_the_parent_only()
    connection = EngineSocket(sock)
    started_s = clock()
    try:
        parts = build()
    except EngineStartError as error:
        return _cannot_start(connection, error.message, error.exit_code)
    except (ConfigError, PlanError) as error:
        return _cannot_start(connection, str(error), EXIT_CONFIG)
    except MemoryError:
        return _cannot_start(connection, "loading the model takes more memory than planned", EXIT_CONFIG)
    core = EngineCore(parts.scheduler, parts.runner, parts.token_bytes, memory=parts.memory, clock=clock)
    _send(connection, Ready(info=model_info(parts.runner, parts.scheduler), load_s=clock() - started_s))
    try:
        return serve(connection, core)
    finally:
        core.close()


def serve(connection: EngineSocket, core: EngineCore) -> int:
    """The loop. Returns the exit code.

    Raises:
        SchedulerError: a defect of the scheduler.
        FrameError, msgspec.ValidationError: the other side does not speak our protocol.
    """
    while True:
        for payload in connection.poll(core.wait_s):
            core.handle(decode_inbox(payload).commands)
        if not connection.is_open:
            _log.info("the API process is gone, the engine ends")
            return 0
        tick = core.tick()
        if tick is not None:
            _send(connection, tick)
        if core.is_shut_down:
            connection.finish(_FAREWELL_S)
            return 0
        if core.is_broken:
            _log.error("the runner fails in every step, the engine ends")
            connection.finish(_FAREWELL_S)
            return EXIT_BROKEN


def _cannot_start(connection: EngineSocket, message: str, exit_code: int) -> int:
    _log.error("the engine cannot start: %s", message)
    _send(connection, Failed(message=message, exit_code=exit_code))
    connection.finish(_FAREWELL_S)
    return exit_code


def _send(connection: EngineSocket, message: Outbox) -> None:
    connection.send(encode(message))


def _obey_the_parent_only() -> None:
    if sys.platform == "linux":
        # A dead parent is also seen as the end of the socket, but not while a step runs or the model loads.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
