"""``PrefixCache``: hashes to blocks, and never a wrong answer."""

from __future__ import annotations

from scheduler.block_pool import BlockPool
from scheduler.prefix_cache import PrefixCache, sha256_digest
from scheduler.request import BlockId
from scheduler.testing import compact, four_bit_digest

SIZE = 2
TOKENS = compact([1, 2, 3, 4, 5, 6])


class Cached:
    """A cache with ``TOKENS`` in blocks 1, 2, 3, all free."""

    def __init__(self, num_blocks: int = 3) -> None:
        self.pool = BlockPool(6)
        self.cache = PrefixCache(self.pool)
        self.root = self.cache.root("", "")
        self.hashes: list[bytes] = []
        for index in range(3):
            before = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(self.cache.chain(before, TOKENS[index * SIZE : index * SIZE + SIZE]))
        for index in range(num_blocks):
            self.insert(index)

    def insert(self, index: int, *, block_id: int | None = None) -> bool:
        return self.cache.insert(
            BlockId(block_id or index + 1),
            self.hashes[index],
            root=self.root,
            parent=BlockId(index) if index else None,
            tokens=TOKENS[index * SIZE : index * SIZE + SIZE],
        )

    def match(self) -> list[BlockId]:
        return self.cache.match(self.root, self.hashes, TOKENS, SIZE)


def test_i11_a_match_is_the_longest_contiguous_prefix() -> None:
    assert Cached().match() == [1, 2, 3]
    assert Cached(num_blocks=2).match() == [1, 2]
    assert Cached(num_blocks=0).match() == []


def test_i9_a_hit_compares_the_tokens_and_not_only_the_hash() -> None:
    world = Cached()
    other = compact([1, 2, 9, 9, 5, 6])
    assert world.cache.match(world.root, world.hashes, other, SIZE) == [1]


def test_i12_a_hit_compares_the_root_and_not_only_the_hash() -> None:
    world = Cached()
    assert world.cache.match(world.cache.root("somebody", "else"), world.hashes, TOKENS, SIZE) == []


def test_i9_a_hit_compares_the_parent_and_not_only_the_hash() -> None:
    world = Cached()
    assert world.cache.match(world.root, world.hashes[1:], TOKENS[SIZE:], SIZE) == []


def test_i12_tenant_salt_and_seed_all_reach_the_root_and_cannot_run_together() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool, seed=b"s")
    roots = {
        cache.root("", ""),
        cache.root("ab", ""),
        cache.root("", "ab"),
        cache.root("a", "b"),
        PrefixCache(pool, seed=b"t").root("", ""),
        PrefixCache(pool, seed=b"").root("s", ""),
    }
    assert len(roots) == 6
    assert cache.root("\ud800", "\ud800") != cache.root("", ""), "lone surrogates are salts like any other"


def test_i9_the_chain_covers_everything_before_a_block() -> None:
    cache = PrefixCache(BlockPool(2))
    block = compact([7, 7])
    assert cache.chain(b"a", block) != cache.chain(b"b", block)
    assert cache.chain(b"a", block) == sha256_digest(b"a" + block.tobytes())


def test_the_first_of_two_equal_blocks_wins() -> None:
    world = Cached(num_blocks=1)
    assert not world.insert(0, block_id=5)
    assert world.match() == [1]
    assert BlockId(5) not in world.cache


def test_a_block_is_cached_once_even_under_another_hash() -> None:
    world = Cached(num_blocks=1)
    assert not world.insert(1, block_id=1)
    assert len(world.cache) == 1


def test_i11_a_block_without_its_parent_is_refused() -> None:
    world = Cached(num_blocks=1)
    assert not world.insert(2)
    assert len(world.cache) == 1
    assert world.insert(1)
    assert world.insert(2)


def test_i9_a_colliding_block_is_refused_and_never_found() -> None:
    cache = PrefixCache(BlockPool(64), hash_function=four_bit_digest)
    root = cache.root("", "")
    accepted = 0
    for token in range(1, 60):
        tokens = compact([token])
        block_hash = cache.chain(root, tokens)
        inserted = cache.insert(BlockId(token), block_hash, root=root, parent=None, tokens=tokens)
        accepted += inserted
        assert cache.match(root, [block_hash], tokens, 1) == ([token] if inserted else [])
    assert accepted == len(cache) <= 16


def test_i11_forgetting_a_block_forgets_its_descendants() -> None:
    world = Cached()
    assert sorted(world.cache.forget(BlockId(2))) == [2, 3]
    assert world.match() == [1]
    assert {entry.block_id: entry.children for entry in world.cache.entries()} == {1: set()}
    assert world.insert(1, block_id=4), "the place is free again"


def test_forgetting_a_leaf_leaves_its_parent() -> None:
    world = Cached()
    assert world.cache.forget(BlockId(3)) == [3]
    assert world.match() == [1, 2]
    assert world.cache.forget(BlockId(3)) == []


def test_forgotten_free_blocks_are_reused_first() -> None:
    world = Cached()
    world.cache.forget(BlockId(2))
    assert set(world.pool.free_blocks()[:2]) == {2, 3}


def test_dropping_the_unheld_leaves_what_is_held_and_what_it_follows() -> None:
    world = Cached()
    for block_id in (1, 2):
        world.pool.retain(BlockId(block_id))
    assert world.cache.drop_unheld() == 1
    assert world.match() == [1, 2]
    world.pool.release(BlockId(2), reuse_soon=False)
    world.pool.release(BlockId(1), reuse_soon=False)
    assert (world.cache.drop_unheld(), len(world.cache), world.cache.drop_unheld()) == (2, 0, 0)


def test_i15_reset_succeeds_only_when_no_block_is_in_use() -> None:
    world = Cached()
    world.pool.retain(BlockId(5))
    assert not world.cache.reset()
    assert world.match() == [1, 2, 3]
    world.pool.release(BlockId(5), reuse_soon=True)
    assert world.cache.reset()
    assert world.match() == []
    assert (len(world.cache), world.cache.entries()) == (0, ())
