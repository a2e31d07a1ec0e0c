"""``PrefixCache``: finds blocks that already hold the keys and values of a given prefix.

Owns the map from chained block hashes to block ids, over a ``BlockPool``. A block's hash covers the blocks
before it, back to a root made of a secret seed, the tenant and the cache salt:

    root = H(seed, tenant, salt)      hash[i] = H(hash[i - 1], tokens of block i),  hash[-1] = root

so equal hashes mean equal prefixes of one tenant. "Mean" is not left to the hash: every hit compares the
root, the parent block and the tokens themselves, so that a collision costs a miss and never a wrong answer.

Invariants: only full blocks are in the map, and only after the step that wrote them succeeded (the caller
publishes; see ``KVCacheManager.publish``). A cached block's parent is cached too: forgetting a block forgets
its descendants, which could not be found any more. Time is the order of the pool's free list; no clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from scheduler.block_pool import BlockPool
from scheduler.request import BlockId

HashFunction = Callable[[bytes], bytes]


def sha256_digest(data: bytes) -> bytes:
    """The default hash: 32 bytes."""
    return sha256(data).digest()


@dataclass(slots=True)
class CachedBlock:
    """What the cache knows of a block."""

    block_id: BlockId
    block_hash: bytes
    root: bytes
    parent: BlockId | None
    tokens: bytes
    """The block's own token ids, for comparison."""
    children: set[BlockId] = field(default_factory=set)


class PrefixCache:
    """Chained block hashes to block ids. Holds no references: free blocks stay findable until reused."""

    def __init__(self, pool: BlockPool, *, seed: bytes = b"", hash_function: HashFunction = sha256_digest) -> None:
        self._pool = pool
        self._seed = seed
        self._hash = hash_function
        self._by_hash: dict[bytes, CachedBlock] = {}
        self._by_block: dict[BlockId, CachedBlock] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._by_block

    def entries(self) -> tuple[CachedBlock, ...]:
        """Everything cached; for the laws."""
        return tuple(self._by_block.values())

    def root(self, tenant: str, salt: str) -> bytes:
        """Start of the hash chain of one tenant and salt. Lengths are hashed too, so the parts cannot run together."""
        parts = (self._seed, tenant.encode("utf-8", "surrogatepass"), salt.encode("utf-8", "surrogatepass"))
        return self._hash(b"".join(len(part).to_bytes(8, "little") + part for part in parts))

    def chain(self, parent_hash: bytes, tokens: array[int]) -> bytes:
        """Hash of a full block that follows ``parent_hash``."""
        return self._hash(parent_hash + tokens.tobytes())

    def match(self, root: bytes, hashes: Sequence[bytes], tokens: array[int], block_size: int) -> list[BlockId]:
        """Blocks of the longest cached prefix among ``hashes`` (hash ``i`` covers block ``i`` of ``tokens``)."""
        matched: list[BlockId] = []
        parent: BlockId | None = None
        for index, block_hash in enumerate(hashes):
            entry = self._by_hash.get(block_hash)
            if entry is None or entry.parent != parent or entry.root != root:
                break
            start = index * block_size
            if entry.tokens != tokens[start : start + block_size].tobytes():
                break
            parent = entry.block_id
            matched.append(entry.block_id)
        return matched

    def insert(
        self, block_id: BlockId, block_hash: bytes, *, root: bytes, parent: BlockId | None, tokens: array[int]
    ) -> bool:
        """Make a full, written block findable. False, and nothing changes, if it would break the chain:
        an equal (or colliding) block is already there, or the parent is not cached."""
        if block_hash in self._by_hash or block_id in self._by_block:
            return False
        if parent is not None:
            if parent not in self._by_block:
                return False
            self._by_block[parent].children.add(block_id)
        entry = CachedBlock(block_id, block_hash, root, parent, tokens.tobytes())
        self._by_hash[block_hash] = entry
        self._by_block[block_id] = entry
        return True

    def forget(self, block_id: BlockId) -> list[BlockId]:
        """Drop a block and its descendants from the map; returns what was dropped (empty if it was not cached)."""
        entry = self._by_block.get(block_id)
        if entry is None:
            return []
        if entry.parent is not None:
            self._by_block[entry.parent].children.discard(block_id)
        dropped: list[BlockId] = []
        pending = [entry]
        while pending:
            entry = pending.pop()
            pending.extend(self._by_block[child] for child in entry.children)
            del self._by_hash[entry.block_hash]
            del self._by_block[entry.block_id]
            dropped.append(entry.block_id)
            self._pool.discard(entry.block_id)
        return dropped

    def drop_unheld(self) -> int:
        """Forget every block that no table holds; returns how many. What held blocks follow is held too, and stays."""
        unheld = [block_id for block_id in self._by_block if self._pool.ref_count(block_id) == 0]
        return sum(len(self.forget(block_id)) for block_id in unheld)

    def reset(self) -> bool:
        """Forget everything, if no block is in use; False and no change otherwise."""
        if self._pool.num_used:
            return False
        self._by_hash.clear()
        self._by_block.clear()
        return True
