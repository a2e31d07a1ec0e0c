"""``TokenStream``: one request's deltas as an async iterator, fed by the client, read by a route.

Owns: the hand-over of deltas from the event loop's read callback to the one consumer, and the translation of
a bad ending into an exception.

Invariants: ``push`` never waits and never fails, whatever the consumer does; deltas come out in order;
nothing comes out after the last; the queue is bounded by the request's ``max_tokens``, because the engine
sends at most one delta per token. A stream has one consumer.

Rejected: ``asyncio.Queue``, which takes four times as long per item and knows no end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from mixtral_serve.engine.errors import EngineError, RequestCancelled
from mixtral_serve.engine.messages import Delta
from scheduler.lifecycle import FinishReason


class TokenStream:
    """The deltas of one request. Ends after the one with a ``finish_reason``.

    As a context manager it cancels the request on the way out, unless it has ended.
    """

    __slots__ = ("_deltas", "_ended", "_is_open", "_is_revoked", "_on_cancel", "_to_error", "_waiter", "request_id")

    def __init__(
        self, request_id: str, on_cancel: Callable[[str], None], to_error: Callable[[Delta], EngineError]
    ) -> None:
        """``to_error`` says what a last delta with finish reason "error" is to the consumer."""
        self.request_id = request_id
        self._on_cancel: Callable[[str], None] | None = on_cancel
        self._to_error = to_error
        self._deltas: deque[Delta] = deque()
        self._ended = False
        self._is_open = True
        self._is_revoked = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_queued(self) -> int:
        """Deltas that the consumer has not taken yet."""
        return len(self._deltas)

    @property
    def is_open(self) -> bool:
        """Whether the engine has yet to say the last of the request."""
        return self._is_open

    def push(self, delta: Delta) -> None:
        """Hand in the next delta. For the client only."""
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._on_cancel = None
            self._is_open = False
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def cancel(self) -> None:
        """Ask the engine to end the request now. Does nothing when it has ended or was cancelled before."""
        on_cancel = self._on_cancel
        self._on_cancel = None
        if on_cancel is not None:
            on_cancel(self.request_id)

    def revoke(self) -> bool:
        """``cancel`` by somebody else than the consumer, who is told. False when the request has ended already."""
        if not self._is_open:
            return False
        self._is_revoked = True
        self.cancel()
        return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            QueueFull, RequestRefused: the engine refused the request after all.
            RequestCancelled: it was revoked.
            RequestFailed: it ended by an error, or the engine died under it.
        """
        while not self._deltas:
            if self._ended:
                raise StopAsyncIteration
            assert self._waiter is None, "a stream has one consumer"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta = self._deltas.popleft()
        if delta.finish_reason is not None:
            self._ended = True
            if delta.finish_reason == FinishReason.ERROR.value:
                raise self._to_error(delta)
            if self._is_revoked and delta.finish_reason == FinishReason.CANCELLED.value:
                raise RequestCancelled
        return delta

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
