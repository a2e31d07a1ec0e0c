"""What the API is made of: handed in once, frozen, never looked up.

Owns: ``Dependencies``, ``ApiSettings`` and ``Engine``, the narrow part of the engine's client that the API uses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mixtral_serve.api.auth import Authenticate, anyone
from mixtral_serve.api.sse import KeepAlive
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.inspection import RequestTable
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Submit
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.text.chat_format import ChatEncoder
from mixtral_serve.text.tokenizer import Tokenizer


class Engine(Protocol):
    """What the API needs of ``mixtral_serve.engine.client.EngineClient``."""

    @property
    def state(self) -> EngineState: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def info(self) -> ModelInfo | None: ...

    def submit(self, requests: Sequence[Submit]) -> tuple[TokenStream, ...]:
        """Start requests, all or none; raises ``RequestRefused`` or ``EngineUnavailable``."""
        ...

    async def inspect(self, tenant: str) -> RequestTable:
        """Who runs and who waits, as of the next tick; raises ``EngineUnavailable``."""
        ...


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits and manners of the API."""

    max_n: int = 16
    """Most choices of one request."""
    max_body_bytes: int = 1_000_000
    body_timeout_s: float = 30.0
    """From the first read of a body to its end."""
    unknown_fields: Literal["error", "warn"] = "error"
    """What an unknown field of a request is: a 400, or a warning header."""
    sse_keep_alive_s: float = 15.0
    """A stream is never silent for longer; 0: it may be."""


def _never_short() -> None:
    """Memory is always enough."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """Everything that routes use."""

    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatEncoder | None
    """None for a base model: chat is refused."""
    model_names: tuple[str, ...]
    """Names the model is served under; answers carry the one that was asked for."""
    render_metrics: Callable[[], bytes]
    """The page of ``/metrics``, in Prometheus' text format."""
    version: str
    memory_report: Callable[[], Mapping[str, object]] = dict
    """The answer of ``/memory``; empty where nobody measures."""
    check_memory: Callable[[], None] = _never_short
    """Raises ``MemoryPressure`` where memory is too short for another request."""
    settings: ApiSettings = ApiSettings()
    authenticate: Authenticate = anyone
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep

    @property
    def keep_alive(self) -> KeepAlive:
        """How streams break their silence."""
        return KeepAlive(self.settings.sse_keep_alive_s, self.pause)
