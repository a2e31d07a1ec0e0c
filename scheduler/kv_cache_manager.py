"""``KVCacheManager``: gives requests their blocks and takes them back.

Owns every change of a ``block_table``. Four moves, each all or nothing:

    adopt      start from a cached prefix: share its blocks
    reserve    grow the table to cover more tokens, with blocks nobody else holds
    publish    after a successful step: make the newly full blocks findable
    release    give everything back (``poisoned`` also makes it unfindable)

Invariants. A shared block is full and never written again: only full blocks are shared, and a request writes
only past them. A block is published only if the block before it is, so that the cache never holds a tail
without its head; where an equal block was published first, this request's copy and all that follows it stay
private. Blocks that are *pledged* to a request stay free until it needs them, but nobody else gets them.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.block_pool import BlockPool
from scheduler.prefix_cache import HashFunction, PrefixCache, sha256_digest
from scheduler.request import BlockId, RequestId, RequestState


class KVCacheManager:
    """Block tables over a pool and a prefix cache."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        cache_seed: bytes = b"",
        hash_function: HashFunction = sha256_digest,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, seed=cache_seed, hash_function=hash_function)
        self._enable_prefix_caching = enable_prefix_caching
        self._pledges: dict[RequestId, int] = {}
        self._num_pledged = 0
        self._evicted: list[BlockId] = []

    @property
    def num_available(self) -> int:
        """Free blocks that are pledged to nobody."""
        return self.pool.num_free - self._num_pledged

    @property
    def pledges(self) -> dict[RequestId, int]:
        """Free blocks held ready per request; a copy."""
        return dict(self._pledges)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or start."""
        return -(-num_tokens // self.block_size)

    def block_hashes(self, state: RequestState, num_blocks: int) -> Sequence[bytes]:
        """Chain hashes of the request's first ``num_blocks`` full blocks, computed once and kept."""
        hashes = state.block_hashes
        size = self.block_size
        while len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else self._root(state)
            start = len(hashes) * size
            hashes.append(self.cache.chain(parent, state.tokens[start : start + size]))
        return hashes[:num_blocks] if len(hashes) > num_blocks else hashes

    def cached_prefix(self, state: RequestState) -> list[BlockId]:
        """Blocks of its longest cached prefix, at most all tokens but one: the last must be computed."""
        if not self._enable_prefix_caching:
            return []
        hashes = self.block_hashes(state, (state.num_tokens - 1) // self.block_size)
        return self.cache.match(self._root(state), hashes, state.tokens, self.block_size)

    def num_free_among(self, blocks: Sequence[BlockId]) -> int:
        """How many of these (cached) blocks nobody holds: adopting them uses up as many free blocks."""
        return sum(self.pool.ref_count(block_id) == 0 for block_id in blocks)

    def adopt(self, state: RequestState, blocks: Sequence[BlockId]) -> None:
        """Begin an empty table with cached blocks; their tokens count as computed."""
        assert not state.block_table, "a table begins with its cached prefix"
        for block_id in blocks:
            self.pool.retain(block_id)
        state.block_table.extend(blocks)
        state.num_computed_tokens = len(blocks) * self.block_size
        state.num_published_blocks = len(blocks)

    def pledge(self, state: RequestState, num_blocks: int) -> None:
        """Keep ``num_blocks`` free blocks ready for the request, beyond those in its table."""
        assert num_blocks <= self.num_available, "a pledge is made of free blocks"
        self._pledges[state.id] = num_blocks
        self._num_pledged += num_blocks

    def capacity(self, state: RequestState) -> int:
        """Tokens its table could cover if it took every block it may take now."""
        own = self._pledges.get(state.id, 0)
        return (len(state.block_table) + self.num_available + own) * self.block_size

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        """Grow the table until it covers ``num_tokens`` tokens. False, and nothing changes, if blocks are short."""
        num_new = -(-num_tokens // self.block_size) - len(state.block_table)
        if num_new <= 0:
            return True
        own = min(self._pledges.get(state.id, 0), num_new)
        if num_new > self.num_available + own:
            return False
        blocks = self.pool.allocate(num_new)
        assert blocks is not None, "pledges never exceed the free blocks"
        if own:
            self._pledges[state.id] -= own
            self._num_pledged -= own
        for block_id in blocks:
            self._evicted.extend(self.cache.forget(block_id))
        state.block_table.extend(blocks)
        return True

    def publish(self, state: RequestState) -> Sequence[bytes]:
        """Make the blocks that the last step filled findable; returns their hashes."""
        num_full = state.num_computed_tokens // self.block_size
        first = state.num_published_blocks
        if num_full == first or not state.publishing or not self._enable_prefix_caching:
            return ()
        hashes = self.block_hashes(state, num_full)
        root = self._root(state)
        for index in range(first, num_full):
            start = index * self.block_size
            state.publishing = self.cache.insert(
                state.block_table[index],
                hashes[index],
                root=root,
                parent=state.block_table[index - 1] if index else None,
                tokens=state.tokens[start : start + self.block_size],
            )
            if not state.publishing:
                break
            state.num_published_blocks = index + 1
        return hashes[first : state.num_published_blocks]

    def release(self, state: RequestState, *, poisoned: bool = False) -> None:
        """Take everything back: table, pledge and progress. ``poisoned`` also unpublishes what it held."""
        for block_id in reversed(state.block_table):
            if poisoned:
                self.cache.forget(block_id)
            self.pool.release(block_id, reuse_soon=block_id not in self.cache)
        self._num_pledged -= self._pledges.pop(state.id, 0)
        # A fresh list, not a cleared one: the plan in flight may still show the old table.
        state.block_table = []
        state.num_computed_tokens = 0
        state.num_published_blocks = 0
        state.publishing = True

    def take_evicted(self) -> list[BlockId]:
        """Cached blocks that were reused since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _root(self, state: RequestState) -> bytes:
        return self.cache.root(state.tenant, state.request.cache_salt)
