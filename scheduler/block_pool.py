"""``BlockPool``: which KV blocks are free, and how many holders each of the others has.

Owns the free list and the reference counts. Knows no tokens, no hashes and no requests.

    block 0          the null block: padding target, never handed out, never written
    ref_count == 0   in the free list, exactly once
    ref_count >= 1   held by that many block tables, not in the free list

The free list is ordered by how soon a block should be reused. A block whose contents are worth keeping (it is
in the prefix cache) is put at the far end when it becomes free, any other one at the near end; taking from
the near end is then least-recently-used eviction, at constant cost.

Rejected: raising when blocks run out. Exhaustion is an everyday outcome of scheduling, so ``allocate``
answers ``None`` and changes nothing; only misuse raises.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from scheduler.errors import AccountingError, ConfigError
from scheduler.request import BlockId

NULL_BLOCK: Final = BlockId(0)


class BlockPool:
    """Free list and reference counts of ``num_blocks`` blocks, of which block 0 is the null block."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ConfigError("num_blocks", f"must be at least 2 (one is the null block), got {num_blocks}")
        self._num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(map(BlockId, range(1, num_blocks)))

    @property
    def num_blocks(self) -> int:
        """All blocks, the null block included."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one holder."""
        return self._num_blocks - 1 - len(self._free)

    def ref_count(self, block_id: BlockId) -> int:
        """How many block tables hold the block."""
        return self._ref_counts[block_id]

    def free_blocks(self) -> tuple[BlockId, ...]:
        """The free list, soonest reused first."""
        return tuple(self._free)

    def allocate(self, num_blocks: int) -> list[BlockId] | None:
        """Take ``num_blocks`` free blocks with one holder each, or none at all."""
        if num_blocks > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in taken:
            self._ref_counts[block_id] = 1
        return taken

    def retain(self, block_id: BlockId) -> None:
        """Add a holder; a free block leaves the free list.

        Raises:
            AccountingError: the null block, or an id outside the pool.
        """
        self._check(block_id)
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: BlockId, *, reuse_soon: bool) -> None:
        """Remove a holder; without holders the block is free, at the near end if ``reuse_soon``.

        Raises:
            AccountingError: the block is free already, the null block, or outside the pool. Nothing changed.
        """
        self._check(block_id)
        if self._ref_counts[block_id] == 0:
            raise AccountingError(f"block {block_id} is free already")
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] == 0:
            self._free[block_id] = None
            if reuse_soon:
                self._free.move_to_end(block_id, last=False)

    def discard(self, block_id: BlockId) -> None:
        """The block's contents are worthless now: if it is free, reuse it first."""
        if self._ref_counts[block_id] == 0:
            self._free.move_to_end(block_id, last=False)

    def _check(self, block_id: BlockId) -> None:
        if not 0 < block_id < self._num_blocks:
            raise AccountingError(f"block {block_id} is not one of 1 to {self._num_blocks - 1}")
