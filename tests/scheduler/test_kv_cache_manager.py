"""``KVCacheManager``: adopt, reserve, publish, release."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scheduler.kv_cache_manager import KVCacheManager
from scheduler.request import RequestState
from scheduler.testing import make_request


def a_request(name: str, prompt: Sequence[int], **fields: object) -> RequestState:
    return RequestState(make_request(name, prompt, **fields), 0)  # type: ignore[arg-type]


def compute(kv: KVCacheManager, state: RequestState, num_tokens: int) -> Sequence[bytes]:
    """What a successful step does: reserve, write, publish."""
    assert kv.reserve(state, num_tokens)
    state.num_computed_tokens = num_tokens
    return kv.publish(state)


def test_blocks_for_tokens_round_up() -> None:
    kv = KVCacheManager(4, 3)
    assert [kv.num_blocks_for(n) for n in (0, 1, 3, 4, 6, 7)] == [0, 1, 1, 2, 2, 3]


def test_i6_a_table_grows_by_just_what_is_needed() -> None:
    kv = KVCacheManager(8, 2)
    state = a_request("a", [1] * 9)
    assert kv.reserve(state, 3)
    assert state.block_table == [1, 2]
    assert kv.reserve(state, 4)
    assert kv.reserve(state, 1)
    assert state.block_table == [1, 2]
    assert kv.reserve(state, 5)
    assert state.block_table == [1, 2, 3]


def test_i8_reserve_gives_everything_or_changes_nothing() -> None:
    kv = KVCacheManager(4, 2)
    state = a_request("a", [1] * 9)
    assert kv.reserve(state, 2)
    assert not kv.reserve(state, 7)
    assert (state.block_table, kv.num_available) == ([1], 2)
    assert kv.reserve(state, 6)


def test_i10_only_full_blocks_are_published_and_only_after_they_were_computed() -> None:
    kv = KVCacheManager(8, 2)
    state = a_request("a", [1, 2, 3, 4, 5])
    assert kv.reserve(state, 5)
    assert len(kv.cache) == 0
    state.num_computed_tokens = 3
    assert len(kv.publish(state)) == 1
    state.num_computed_tokens = 5
    assert len(kv.publish(state)) == 1
    assert kv.publish(state) == ()
    assert sorted(entry.block_id for entry in kv.cache.entries()) == [1, 2]


def test_i11_a_hit_leaves_the_last_token_to_compute() -> None:
    kv = KVCacheManager(8, 2)
    compute(kv, a_request("a", [1, 2, 3, 4]), 4)
    assert kv.cached_prefix(a_request("b", [1, 2, 3, 4])) == [1]
    assert kv.cached_prefix(a_request("b", [1, 2, 3, 4, 5])) == [1, 2]
    assert kv.cached_prefix(a_request("b", [1])) == []


def test_i12_a_prefix_is_found_only_by_its_own_tenant_and_salt() -> None:
    kv = KVCacheManager(8, 2)
    compute(kv, a_request("a", [1, 2, 3], tenant="acme"), 3)
    assert kv.cached_prefix(a_request("b", [1, 2, 3], tenant="acme")) == [1]
    assert kv.cached_prefix(a_request("b", [1, 2, 3])) == []
    assert kv.cached_prefix(a_request("b", [1, 2, 3], tenant="acme", cache_salt="mine")) == []


def test_i5_an_adopted_prefix_counts_as_computed_and_its_blocks_are_shared() -> None:
    kv = KVCacheManager(8, 2)
    first, second = a_request("a", [1, 2, 3]), a_request("b", [1, 2, 9])
    compute(kv, first, 3)
    cached = kv.cached_prefix(second)
    assert kv.num_free_among(cached) == 0
    kv.adopt(second, cached)
    assert (second.block_table, second.num_computed_tokens, second.num_published_blocks) == ([1], 2, 1)
    assert kv.pool.ref_count(cached[0]) == 2
    compute(kv, second, 3)
    assert second.block_table == [1, 3]


def test_adopting_free_cached_blocks_uses_them_up() -> None:
    kv = KVCacheManager(8, 2)
    first, second = a_request("a", [1, 2, 3]), a_request("b", [1, 2, 9])
    compute(kv, first, 3)
    kv.release(first)
    cached = kv.cached_prefix(second)
    assert kv.num_free_among(cached) == 1
    before = kv.num_available
    kv.adopt(second, cached)
    assert kv.num_available == before - 1


def test_a_prefix_is_adopted_only_by_an_empty_table() -> None:
    kv = KVCacheManager(8, 2)
    state = a_request("a", [1, 2, 3])
    compute(kv, state, 3)
    with pytest.raises(AssertionError, match="begins with its cached prefix"):
        kv.adopt(state, [])


def test_who_loses_the_race_keeps_its_block_and_all_that_follow_private() -> None:
    kv = KVCacheManager(12, 2)
    first, second = a_request("a", [1, 2, 3, 4, 5, 6]), a_request("b", [1, 2, 3, 4, 5, 6])
    kv.reserve(second, 6)
    compute(kv, first, 2)
    assert compute(kv, second, 6) == []
    assert (second.publishing, second.num_published_blocks) == (False, 0)
    compute(kv, first, 6)
    assert kv.publish(second) == ()
    assert {entry.block_id for entry in kv.cache.entries()} == set(first.block_table)


def test_i9_a_hash_may_collide_the_second_block_just_stays_private() -> None:
    kv = KVCacheManager(12, 2, hash_function=lambda _: b"the same for everything")
    first, second = a_request("a", [1, 2, 3]), a_request("b", [7, 8, 9])
    compute(kv, first, 3)
    assert kv.cached_prefix(second) == []
    assert compute(kv, second, 3) == []
    assert kv.cached_prefix(a_request("c", [1, 2, 3])) == [1]


def test_release_takes_everything_back_and_leaves_the_published_blocks_findable() -> None:
    kv = KVCacheManager(8, 2)
    state = a_request("a", [1, 2, 3, 4, 5])
    compute(kv, state, 5)
    table = state.block_table
    kv.release(state)
    assert (kv.num_available, state.num_computed_tokens, state.num_published_blocks) == (7, 0, 0)
    assert kv.cached_prefix(a_request("b", [1, 2, 3, 4, 5])) == [1, 2]
    assert table == [1, 2, 3], "the plan in flight still reads the old table"
    assert state.block_table == []


def test_i13_the_tail_of_a_sequence_is_evicted_before_its_head_and_unpublished_blocks_before_both() -> None:
    kv = KVCacheManager(4, 2)
    first = a_request("a", [1, 2, 3, 4, 5])
    compute(kv, first, 5)
    kv.release(first)
    assert kv.pool.free_blocks() == (3, 2, 1)
    other = a_request("b", [9, 9, 9, 9])
    compute(kv, other, 2)
    assert kv.take_evicted() == []
    compute(kv, other, 4)
    assert kv.take_evicted() == [2]
    assert kv.take_evicted() == []
    assert kv.cached_prefix(a_request("c", [1, 2, 3, 4, 5])) == [1]


def test_i13_the_least_recently_used_prefix_is_evicted_first() -> None:
    kv = KVCacheManager(4, 2)
    for name, prompt in [("a", [1, 1]), ("b", [2, 2]), ("c", [3, 3])]:
        state = a_request(name, prompt)
        compute(kv, state, 2)
        kv.release(state)
    again = a_request("again", [1, 1, 5])
    kv.adopt(again, kv.cached_prefix(again))
    kv.release(again)
    compute(kv, a_request("d", [4, 4]), 2)
    assert [bool(kv.cached_prefix(a_request("x", [n, n, 9]))) for n in (1, 2, 3, 4)] == [True, False, True, True]


def test_i14_poisoned_blocks_and_their_descendants_are_not_findable_even_while_shared() -> None:
    kv = KVCacheManager(12, 2)
    first, second = a_request("a", [1, 2, 3]), a_request("b", [1, 2, 3, 4, 5])
    compute(kv, first, 3)
    kv.adopt(second, kv.cached_prefix(second))
    compute(kv, second, 5)
    kv.release(first, poisoned=True)
    assert kv.cached_prefix(a_request("c", [1, 2, 3, 4, 5])) == []
    assert len(kv.cache) == 0
    second.tokens.append(6)
    assert compute(kv, second, 6) == [], "what follows a lost block stays private"


def test_i22_pledged_blocks_are_kept_for_their_owner() -> None:
    kv = KVCacheManager(6, 2)
    owner, other = a_request("owner", [1] * 8), a_request("other", [2] * 8)
    kv.pledge(owner, 3)
    assert (kv.num_available, kv.pledges) == (2, {owner.id: 3})
    assert (kv.capacity(owner), kv.capacity(other)) == (10, 4)
    assert not kv.reserve(other, 5)
    assert kv.reserve(other, 4)
    assert not kv.reserve(owner, 7)
    assert kv.reserve(owner, 3)
    assert kv.pledges == {owner.id: 1}
    assert kv.reserve(owner, 6)
    assert (kv.pledges, kv.num_available) == ({owner.id: 0}, 0)


def test_a_pledge_is_used_before_free_blocks_and_given_back_with_the_rest() -> None:
    kv = KVCacheManager(8, 2)
    owner = a_request("owner", [1] * 12)
    kv.pledge(owner, 2)
    assert kv.reserve(owner, 6)
    assert (kv.pledges, kv.num_available) == ({owner.id: 0}, 4)
    kv.release(owner)
    assert (kv.pledges, kv.num_available) == ({}, 7)
    kv.pledge(owner, 7)
    kv.release(owner)
    assert (kv.pledges, kv.num_available) == ({}, 7)


def test_nobody_is_pledged_more_than_is_free() -> None:
    kv = KVCacheManager(4, 2)
    with pytest.raises(AssertionError, match="made of free blocks"):
        kv.pledge(a_request("a", [1]), 4)


def test_without_prefix_caching_nothing_is_published_or_found() -> None:
    kv = KVCacheManager(8, 2, enable_prefix_caching=False)
    state = a_request("a", [1, 2, 3])
    assert compute(kv, state, 3) == ()
    assert kv.cached_prefix(a_request("b", [1, 2, 3])) == []
    assert len(kv.cache) == 0


def test_hashes_are_kept_and_their_number_is_what_was_asked() -> None:
    kv = KVCacheManager(8, 2)
    state = a_request("a", [1, 2, 3, 4, 5, 6])
    three = kv.block_hashes(state, 3)
    assert kv.block_hashes(state, 2) == three[:2]
    assert len(state.block_hashes) == 3
