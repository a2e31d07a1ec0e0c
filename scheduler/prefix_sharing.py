"""``PrefixSharing``: what of its prompt a request can have from others, or should wait for.

Owns the question, not the answers: blocks that were computed are the prefix cache's (``kv_cache_manager``), blocks that
are being computed are ``in_flight``'s. A prompt that is scored needs the logits of all its rows and an embedding all
hidden states; a cached block has neither, so such requests neither look up nor wait, but what they compute may be found
by others.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.config import SchedulerConfig
from scheduler.in_flight import InFlightPrefixes
from scheduler.kv_cache_manager import KVCacheManager
from scheduler.lifecycle import RequestStatus
from scheduler.request import BlockId, RequestKind, RequestState


class PrefixSharing:
    """What requests can take over from each other. Changes nothing but ``in_flight``, in ``lead``."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, in_flight: InFlightPrefixes) -> None:
        self._config = config
        self._kv = kv
        self._in_flight = in_flight

    def cached(self, state: RequestState) -> list[BlockId]:
        """Blocks of the longest prefix that was computed before."""
        return self._kv.cached_prefix(state) if _may_look_up(state) else []

    def awaited(self, state: RequestState, num_cached_blocks: int) -> bytes | None:
        """The block hash that the request should wait for behind its cached blocks, if another request is computing
        more of its prefix. Who was preempted does not wait."""
        if not self._config.enable_prefix_caching or state.status is RequestStatus.PREEMPTED or not _may_look_up(state):
            return None
        return self._in_flight.last_shared(self._shareable_hashes(state)[num_cached_blocks:])

    def lead(self, state: RequestState, num_cached_blocks: int) -> None:
        """The request starts behind its cached blocks: others may wait for what comes next."""
        if self._config.enable_prefix_caching:
            self._in_flight.lead(state.id, self._shareable_hashes(state)[num_cached_blocks:])

    def _shareable_hashes(self, state: RequestState) -> Sequence[bytes]:
        """Hashes of the full blocks that a request with the same tokens could find in the cache."""
        return self._kv.block_hashes(state, (state.num_tokens - 1) // self._config.block_size)


def _may_look_up(state: RequestState) -> bool:
    return not (state.request.scores_prompt or state.kind is RequestKind.EMBED)
