"""The answers that are under way, by their ids, so that somebody else than their reader can end them.

Owns: ``TrackedEngine``, an engine that remembers whose answers its streams are. An answer's id is what its client
reads in ``id``; each of its choices is a request of its own, named after it.

Invariants: an answer can be cancelled only within the tenant that asked for it, and to others it does not exist;
those that have ended are forgotten after at most as many again have begun, so the memory is that of what lives.

Rejected: a hook in every route for the end of an answer, which one of them would forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mixtral_serve.api.deps import Engine
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.inspection import RequestTable
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Submit
from mixtral_serve.engine.stream import TokenStream

_LEAST_KEPT: Final = 64


def answer_id(request_id: str) -> str:
    """The id of the answer that a request is a choice of."""
    return request_id.rpartition("-")[0]


def choice_index(request_id: str) -> int:
    """Which choice of its answer a request is."""
    return int(request_id.rpartition("-")[2])


class TrackedEngine:
    """An ``Engine`` whose answers can be cancelled by id."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers: dict[tuple[str, str], list[TokenStream]] = {}
        self._prune_at = _LEAST_KEPT

    @property
    def state(self) -> EngineState:
        """See ``Engine``."""
        return self._engine.state

    @property
    def is_ready(self) -> bool:
        """See ``Engine``."""
        return self._engine.is_ready

    @property
    def info(self) -> ModelInfo | None:
        """See ``Engine``."""
        return self._engine.info

    @property
    def num_kept(self) -> int:
        """Answers that are remembered, ended ones among them."""
        return len(self._answers)

    def submit(self, requests: Sequence[Submit]) -> tuple[TokenStream, ...]:
        """See ``Engine``."""
        streams = self._engine.submit(requests)
        for request, stream in zip(requests, streams, strict=True):
            key = (request.tenant, answer_id(request.request_id))
            self._answers.setdefault(key, []).append(stream)
        if len(self._answers) > self._prune_at:
            self._answers = {key: kept for key, kept in self._answers.items() if any(s.is_open for s in kept)}
            self._prune_at = max(_LEAST_KEPT, 2 * len(self._answers))
        return streams

    async def inspect(self, tenant: str) -> RequestTable:
        """See ``Engine``."""
        return await self._engine.inspect(tenant)

    def cancel(self, answer: str, *, tenant: str) -> int:
        """End all choices of an answer. Returns how many were still under way; 0 for unknown and ended answers."""
        return sum([stream.revoke() for stream in self._answers.pop((tenant, answer), ())])
