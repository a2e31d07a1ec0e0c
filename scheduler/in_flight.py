"""``InFlightPrefixes``: equal prompts wait for each other instead of being computed side by side.

When a request starts, it *leads* the full prompt blocks that it is going to compute. A request that would have to
compute one of those same blocks is set aside until the leader has published the last block they share, and
then finds it in the prefix cache. The n choices of one call and a burst of calls with one system prompt are
computed once this way, without copy-on-write: the partial last block is simply computed by each.

Invariants: a hash has at most one leader, and leaders run; a request set aside waits for a hash that has a leader.
When the leader publishes that hash, is preempted or ends, its waiters are handed back; so nobody waits for a
prefix that nobody computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scheduler.request import RequestId, RequestState


class InFlightPrefixes:
    """Which block hashes are being computed, by whom, and who waits for them."""

    def __init__(self) -> None:
        self._leader_of: dict[bytes, RequestId] = {}
        self._led_by: dict[RequestId, list[bytes]] = {}
        self._waiters: dict[bytes, dict[RequestId, RequestState]] = {}
        self._awaits: dict[RequestId, bytes] = {}

    def __len__(self) -> int:
        """How many requests are set aside."""
        return len(self._awaits)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._awaits

    @property
    def leads_any(self) -> bool:
        """Whether any prefix is in flight."""
        return bool(self._leader_of or self._led_by)

    def leader_of(self, block_hash: bytes) -> RequestId | None:
        """Who computes this block now."""
        return self._leader_of.get(block_hash)

    def awaited(self) -> dict[RequestId, bytes]:
        """Requests set aside and the hash each waits for; a copy."""
        return dict(self._awaits)

    def lead(self, request_id: RequestId, hashes: Iterable[bytes]) -> None:
        """``request_id`` is going to compute these blocks; those that have a leader keep it."""
        led = [block_hash for block_hash in hashes if block_hash not in self._leader_of]
        self._leader_of.update(dict.fromkeys(led, request_id))
        if led:
            self._led_by[request_id] = led

    def last_shared(self, hashes: Sequence[bytes]) -> bytes | None:
        """The last of the leading ``hashes`` that are in flight; None if the first is not."""
        last = None
        for block_hash in hashes:
            if block_hash not in self._leader_of:
                break
            last = block_hash
        return last

    def set_aside(self, state: RequestState, block_hash: bytes) -> None:
        """Let ``state`` wait for ``block_hash``."""
        assert block_hash in self._leader_of, "somebody must compute what others wait for"
        self._waiters.setdefault(block_hash, {})[state.id] = state
        self._awaits[state.id] = block_hash

    def withdraw(self, request_id: RequestId) -> None:
        """The request waits no longer (it ended, or runs without waiting). Unknown ids are fine."""
        block_hash = self._awaits.pop(request_id, None)
        if block_hash is not None:
            waiters = self._waiters[block_hash]
            del waiters[request_id]
            if not waiters:
                del self._waiters[block_hash]

    def published(self, request_id: RequestId, hashes: Iterable[bytes]) -> list[RequestState]:
        """These blocks are findable now. Returns who may go on."""
        led = self._led_by.get(request_id)
        if led is None:
            return []
        ready: list[RequestState] = []
        for block_hash in hashes:
            if self._leader_of.get(block_hash) == request_id:
                del self._leader_of[block_hash]
                ready.extend(self._wake(block_hash))
        return ready

    def dissolve(self, request_id: RequestId) -> list[RequestState]:
        """The leader stops computing (it ended, or was preempted). Returns who may go on."""
        ready: list[RequestState] = []
        for block_hash in self._led_by.pop(request_id, ()):
            if self._leader_of.get(block_hash) == request_id:
                del self._leader_of[block_hash]
                ready.extend(self._wake(block_hash))
        return ready

    def _wake(self, block_hash: bytes) -> list[RequestState]:
        ready = list(self._waiters.pop(block_hash, {}).values())
        for state in ready:
            del self._awaits[state.id]
        return ready
