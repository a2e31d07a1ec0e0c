"""``BlockPool``: the free list and the reference counts."""

from __future__ import annotations

import pytest

from scheduler.block_pool import NULL_BLOCK, BlockPool
from scheduler.errors import AccountingError, ConfigError
from scheduler.request import BlockId


def snapshot(pool: BlockPool) -> tuple[object, ...]:
    """Everything that can be seen of a pool."""
    ref_counts = [pool.ref_count(BlockId(block_id)) for block_id in range(pool.num_blocks)]
    return (pool.free_blocks(), pool.num_free, pool.num_used, ref_counts)


def test_i1_a_fresh_pool_has_all_blocks_free_but_the_null_block() -> None:
    pool = BlockPool(4)
    assert pool.free_blocks() == (1, 2, 3)
    assert (pool.num_blocks, pool.num_free, pool.num_used) == (4, 3, 0)
    assert pool.ref_count(NULL_BLOCK) == 0


def test_a_pool_needs_one_block_beside_the_null_block() -> None:
    assert BlockPool(2).num_free == 1
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockPool(1)


def test_allocated_blocks_have_one_holder_and_come_from_the_near_end() -> None:
    pool = BlockPool(5)
    assert pool.allocate(2) == [1, 2]
    assert pool.free_blocks() == (3, 4)
    assert [pool.ref_count(BlockId(b)) for b in (1, 2, 3)] == [1, 1, 0]
    assert pool.num_used == 2


def test_i8_allocate_gives_all_blocks_or_changes_nothing() -> None:
    pool = BlockPool(4)
    before = snapshot(pool)
    assert pool.allocate(4) is None
    assert snapshot(pool) == before
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(0) == []


def test_i2_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    pool.retain(BlockId(1))
    pool.release(BlockId(1), reuse_soon=True)
    assert pool.ref_count(BlockId(1)) == 1
    assert pool.free_blocks() == (2,)
    pool.release(BlockId(1), reuse_soon=True)
    assert pool.free_blocks() == (1, 2)


def test_i13_blocks_worth_keeping_are_reused_last_and_in_the_order_they_were_let_go() -> None:
    pool = BlockPool(5)
    pool.allocate(3)
    pool.release(BlockId(2), reuse_soon=False)
    pool.release(BlockId(1), reuse_soon=False)
    pool.release(BlockId(3), reuse_soon=True)
    assert pool.free_blocks() == (3, 4, 2, 1)


def test_a_free_block_that_is_retained_leaves_the_free_list() -> None:
    pool = BlockPool(4)
    pool.retain(BlockId(2))
    assert pool.free_blocks() == (1, 3)
    assert pool.ref_count(BlockId(2)) == 1


def test_a_discarded_free_block_is_reused_first() -> None:
    pool = BlockPool(4)
    pool.discard(BlockId(3))
    assert pool.free_blocks() == (3, 1, 2)


def test_a_discarded_held_block_stays_with_its_holder() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    pool.discard(BlockId(1))
    assert pool.free_blocks() == (2, 3)
    assert pool.ref_count(BlockId(1)) == 1


def test_i7_releasing_a_free_block_raises_and_changes_nothing() -> None:
    pool = BlockPool(3)
    before = snapshot(pool)
    with pytest.raises(AccountingError, match="free already"):
        pool.release(BlockId(1), reuse_soon=True)
    assert snapshot(pool) == before


@pytest.mark.parametrize("block_id", [NULL_BLOCK, BlockId(3), BlockId(-1)])
def test_i7_the_null_block_and_strangers_are_never_held_or_released(block_id: BlockId) -> None:
    pool = BlockPool(3)
    before = snapshot(pool)
    with pytest.raises(AccountingError, match="not one of 1 to 2"):
        pool.retain(block_id)
    with pytest.raises(AccountingError, match="not one of 1 to 2"):
        pool.release(block_id, reuse_soon=False)
    assert snapshot(pool) == before
