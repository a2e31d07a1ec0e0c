"""The memory accountant: plans that add up, reservations that are given back exactly once."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.accountant import (
    ALTERNATIVE_BYTES,
    DEFAULT_CAP_BYTES,
    LOGPROB_BYTES,
    QUEUED_TOKEN_BYTES,
    REQUEST_OVERHEAD_BYTES,
    KVLayout,
    MemoryAccountant,
    logprob_bytes,
    plan_memory,
    request_bytes,
)
from scheduler.errors import AccountingError, ConfigError, MemoryFullError, PlanError

MIXTRAL = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, bytes_per_element=2, block_size=16)
TINY = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, bytes_per_element=1, block_size=4)
"""8 bytes per block."""


def test_i33_the_layout_of_mixtral_costs_what_the_paper_says() -> None:
    assert MIXTRAL.bytes_per_token == 131_072
    assert MIXTRAL.bytes_per_block == 2_097_152


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "bytes_per_element", "block_size"])
def test_a_layout_names_the_field_that_is_too_small(field: str) -> None:
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "bytes_per_element": 1, "block_size": 1}
    assert KVLayout(**fields).bytes_per_block == 2
    with pytest.raises(ConfigError, match=f"{field}: must be at least 1, got 0"):
        KVLayout(**{**fields, field: 0})


def test_a_quantised_cache_pays_for_one_scale_per_token_and_head() -> None:
    int8 = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, bytes_per_element=1, block_size=16, scale_bytes=4)
    assert int8.bytes_per_token == 2 * 32 * 8 * (128 + 4)
    with pytest.raises(ConfigError, match="scale_bytes: must not be negative, got -1"):
        KVLayout(1, 1, 1, 1, 1, scale_bytes=-1)


def test_the_rest_of_the_cap_becomes_blocks() -> None:
    plan = plan_memory(100, TINY, {"weights": 51}, min_tokens=4)
    assert (plan.num_blocks, plan.kv_cache_bytes, plan.planned_bytes, plan.num_kv_tokens) == (6, 48, 99, 20)


def test_bf16_mixtral_does_not_fit_under_the_default_cap_and_int8_does() -> None:
    with pytest.raises(PlanError, match="MISSING"):
        plan_memory(DEFAULT_CAP_BYTES, MIXTRAL, {"weights": 93_405_585_408}, min_tokens=32768)
    plan = plan_memory(DEFAULT_CAP_BYTES, MIXTRAL, {"weights": 48_300_000_000}, min_tokens=32768)
    assert plan.planned_bytes <= DEFAULT_CAP_BYTES == 90_000_000_000
    assert plan.num_kv_tokens > 300_000


def test_no_more_blocks_are_planned_than_tokens_are_wanted() -> None:
    plan = plan_memory(10_000, TINY, {}, min_tokens=4, max_tokens=9)
    assert (plan.num_blocks, plan.num_kv_tokens) == (4, 12)
    assert plan_memory(10_000, TINY, {}, min_tokens=9, max_tokens=1).num_kv_tokens == 12, "one request must fit"
    assert plan_memory(40, TINY, {}, min_tokens=4, max_tokens=100).num_blocks == 5


def test_a_plan_that_is_one_byte_short_is_refused_with_a_table() -> None:
    just = plan_memory(66, TINY, {"weights": 50}, min_tokens=4)
    assert just.num_blocks == 2
    assert just.table().splitlines()[-1].startswith("  left under the cap")
    with pytest.raises(PlanError) as caught:
        plan_memory(65, TINY, {"weights": 50}, min_tokens=4)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the memory plan does not fit under the cap"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "weights",
        "KV cache (at least 2 blocks for 4 tokens)",
        "sum",
        "cap",
        "MISSING",
    ]


def test_a_plan_says_what_sets_its_cap_and_how_many_requests_it_holds() -> None:
    plan = plan_memory(100, TINY, {"weights": 51}, min_tokens=4, cap_name="limit of somebody")
    assert "  limit of somebody  " in plan.table()
    assert [plan.num_requests_of(num_tokens) for num_tokens in (1, 4, 5, 20, 21)] == [5, 5, 2, 1, 0]
    with pytest.raises(PlanError, match="does not fit under the limit of somebody"):
        plan_memory(50, TINY, {"weights": 51}, min_tokens=4, cap_name="limit of somebody")


def test_demands_beyond_the_cap_leave_no_blocks() -> None:
    with pytest.raises(PlanError):
        plan_memory(10, TINY, {"weights": 50}, min_tokens=1)


def test_a_negative_demand_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="workspace: must not be negative, got -1"):
        plan_memory(100, TINY, {"workspace": -1}, min_tokens=1)
    assert plan_memory(16, TINY, {"workspace": 0}, min_tokens=1).num_blocks == 2


def test_the_table_says_what_was_asked_and_what_is_there() -> None:
    plan = plan_memory(90_000_000_000, MIXTRAL, {"weights": 48_300_000_000}, min_tokens=32768, max_tokens=100_000)
    name = "KV cache (6,251 blocks, 100,000 tokens)"
    assert plan.table().splitlines() == [
        f"  {'weights':<{len(name)}}     48.300 GB",
        f"  {name}     13.109 GB",
        f"  {'sum':<{len(name)}}     61.409 GB",
        f"  {'cap':<{len(name)}}     90.000 GB",
        f"  {'left under the cap':<{len(name)}}     28.591 GB",
    ]


demands = st.dictionaries(st.sampled_from(["weights", "workspace", "queues"]), st.integers(0, 500))


@given(demands, st.integers(0, 1000), st.integers(0, 400), st.integers(1, 60), st.integers(1, 60))
def test_i36_a_larger_cap_or_a_smaller_request_never_turns_a_plan_away(
    asked: dict[str, int], cap: int, more_bytes: int, min_tokens: int, fewer_tokens: int
) -> None:
    try:
        plan = plan_memory(cap, TINY, asked, min_tokens=min_tokens)
    except PlanError:
        return
    assert plan.planned_bytes <= cap
    assert plan.num_kv_tokens >= min_tokens
    larger = plan_memory(cap + more_bytes, TINY, asked, min_tokens=min_tokens)
    smaller = plan_memory(cap, TINY, asked, min_tokens=max(1, min_tokens - fewer_tokens))
    assert larger.num_blocks >= plan.num_blocks
    assert smaller.num_blocks >= plan.num_blocks


@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 32))
def test_i36_a_smaller_request_never_costs_more(num_prompt_tokens: int, max_tokens: int, block_size: int) -> None:
    cost = request_bytes(num_prompt_tokens, max_tokens, block_size)
    assert request_bytes(num_prompt_tokens + 1, max_tokens, block_size) > cost
    assert request_bytes(num_prompt_tokens, max_tokens + 1, block_size) > cost


def test_a_request_is_charged_for_its_prompt_its_blocks_and_its_undelivered_output() -> None:
    assert (REQUEST_OVERHEAD_BYTES, QUEUED_TOKEN_BYTES) == (8192, 512)
    fixed = REQUEST_OVERHEAD_BYTES
    assert request_bytes(0, 0, 4) == fixed
    assert request_bytes(4, 0, 4) == fixed + 12 * 4 + 160
    assert request_bytes(5, 0, 4) == fixed + 12 * 5 + 320
    assert request_bytes(4, 4, 4) == fixed + 8 * 4 + 4 * 8 + 320 + 4 * QUEUED_TOKEN_BYTES


def test_log_probabilities_are_charged_for_their_alternatives() -> None:
    assert logprob_bytes(0, 0, 20) == 0
    assert logprob_bytes(3, 0, 0) == 3 * LOGPROB_BYTES
    assert logprob_bytes(3, 5, 2) == 3 * LOGPROB_BYTES + 8 * 2 * ALTERNATIVE_BYTES
    entry = (7, -0.5, tuple((1000 + i, -1.5 - i) for i in range(20)))
    assert deep_size(entry) + 8 <= logprob_bytes(1, 0, 20)


def deep_size(value: object) -> int:
    """Bytes of a value and all that it holds."""
    inner = sum(deep_size(item) for item in value) if isinstance(value, tuple) else 0
    return sys.getsizeof(value) + inner


def test_i31_the_budget_can_be_used_up_but_not_exceeded() -> None:
    accountant = MemoryAccountant(10)
    accountant.reserve("a", 6)
    with pytest.raises(MemoryFullError, match="b: 5 bytes are needed, 4 are available") as caught:
        accountant.reserve("b", 5)
    assert (caught.value.num_bytes, caught.value.available_bytes) == (5, 4)
    assert accountant.stats().num_reservations == 1
    accountant.reserve("b", 4)
    assert accountant.available_bytes == 0
    accountant.reserve("nothing", 0)


def test_i32_a_reservation_is_given_back_exactly_once() -> None:
    accountant = MemoryAccountant(10)
    first = accountant.reserve("a", 3)
    second = accountant.reserve("a", 4)
    assert accountant.stats().by_name == {"a": 7}
    assert accountant.reserved_bytes == 7
    accountant.release(first)
    with pytest.raises(AccountingError, match="is not held"):
        accountant.release(first)
    stats = accountant.stats()
    assert (stats.reserved_bytes, stats.available_bytes, stats.by_name) == (4, 6, {"a": 4})
    accountant.release(second)
    stats = accountant.stats()
    assert (stats.reserved_bytes, stats.num_reservations, stats.by_name) == (0, 0, {})


def test_i32_ids_of_reservations_are_never_used_again() -> None:
    accountant = MemoryAccountant(10)
    first = accountant.reserve("a", 1)
    accountant.release(first)
    assert accountant.reserve("a", 1) != first


def test_i31_nothing_negative_is_accepted() -> None:
    with pytest.raises(ConfigError, match="budget_bytes: must not be negative, got -1"):
        MemoryAccountant(-1)
    assert MemoryAccountant(0).available_bytes == 0
    with pytest.raises(ConfigError, match="a: must not be negative, got -1"):
        MemoryAccountant(5).reserve("a", -1)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.booleans())), st.integers(0, 100))
def test_i31_i32_the_books_balance_whatever_is_reserved_and_released(
    moves: list[tuple[str, int, bool]], budget: int
) -> None:
    accountant = MemoryAccountant(budget)
    held: list[tuple[object, int]] = []
    for name, num_bytes, releases in moves:
        if releases and held:
            reservation, _ = held.pop()
            accountant.release(reservation)  # type: ignore[arg-type]
        elif num_bytes <= accountant.available_bytes:
            held.append((accountant.reserve(name, num_bytes), num_bytes))
        stats = accountant.stats()
        assert stats.reserved_bytes == sum(size for _, size in held) == sum(stats.by_name.values()) <= budget
    for reservation, _ in held:
        accountant.release(reservation)  # type: ignore[arg-type]
    assert accountant.stats().reserved_bytes == 0
