"""Paged attention over a ragged row equals plain attention over each request's own keys, whatever other slots hold."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.model.attention import paged_attention_forward
from mixtral_serve.model.batch import build_inputs
from mixtral_serve.model.kv_cache import PagedKVCache, gather_blocks
from mixtral_serve.model.shape import ModelShape
from scheduler.accountant import KVLayout
from scheduler.plan import ScheduledSlice, StepPlan
from scheduler.request import BlockId, RequestId

SHAPE = ModelShape(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=2,
    num_experts_per_token=1,
    max_model_len=512,
)


def make_slice(name: str, start: int, num_tokens: int, table: list[int]) -> ScheduledSlice:
    tokens = array("i", [position % 8 for position in range(start + num_tokens)])
    return ScheduledSlice(RequestId(name), start, num_tokens, tokens, [BlockId(b) for b in table], 1, True, 0)


def plain_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None
) -> torch.Tensor:
    """[tokens, heads, head_dim] from the whole context, one score matrix, repeated key heads."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(queries.shape[-1])
    at = torch.arange(start, start + queries.shape[0]).unsqueeze(1)
    key = torch.arange(keys.shape[0]).unsqueeze(0)
    hidden = (key > at) | (key <= at - (window or 1 << 30))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(dim=-1), values)


@dataclass
class World:
    """A cache full of NaN, requests whose past is written through it, and one step over all of them."""

    cache: PagedKVCache
    window: int | None
    plan: StepPlan
    max_mask_elements: int

    def run(self) -> float:
        """The largest difference from plain attention; NaN if anything leaked."""
        generator = torch.Generator().manual_seed(0)
        self.cache.poison()
        contexts = {}
        for part in self.plan.slices:
            end = part.start + part.num_tokens
            contexts[part.request_id] = [
                torch.randn(end, heads, SHAPE.head_dim, generator=generator) for heads in (4, 2, 2)
            ]
        past = [
            make_slice(part.request_id, 0, part.start, list(part.block_table))
            for part in self.plan.slices
            if part.start
        ]
        if past:
            self.step(StepPlan(0, tuple(past), ()), contexts)
        found = self.step(self.plan, contexts)
        worst = 0.0
        for part in self.plan.slices:
            queries, keys, values = contexts[part.request_id]
            keys, values = (held.to(self.cache.dtype).float() for held in (keys, values))
            wanted = plain_attention(queries[part.start :], keys, values, part.start, self.window)
            error = float((found[part.request_id] - wanted).abs().max())
            worst = error if math.isnan(error) else max(worst, error)
        return worst

    def step(self, plan: StepPlan, contexts: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs = build_inputs(plan, self.cache, sliding_window=self.window)
        self.cache.clear(inputs.fresh_blocks)
        order = sorted(range(len(plan.slices)), key=lambda i: inputs.first_rows[i])
        rows = [
            torch.cat([contexts[(p := plan.slices[i]).request_id][k][p.start : p.start + p.num_tokens] for i in order])
            for k in range(3)
        ]
        out, weights = paged_attention_forward(
            SimpleNamespace(layer_idx=1),
            *(row.transpose(0, 1).unsqueeze(0) for row in rows),
            None,
            1 / math.sqrt(SHAPE.head_dim),
            self.window,
            step=replace(inputs.attention, max_mask_elements=self.max_mask_elements),
            dropout=0.0,
        )
        assert weights is None
        return {
            part.request_id: out[0, first : first + part.num_tokens]
            for part, first in zip(plan.slices, inputs.first_rows, strict=True)
        }


@st.composite
def worlds(draw: st.DrawFn) -> World:
    size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    window = draw(st.sampled_from([None, None, 1, 2, 5, 16, 40]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 60), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=8)
    )
    needed = [-(-(start + num) // size) for start, num in lengths]
    blocks = draw(st.permutations(range(1, sum(needed) + 4)))
    slices = []
    for i, (start, num) in enumerate(lengths):
        first = sum(needed[:i])
        slices.append(make_slice(f"r{i}", start, num, list(blocks[first : first + needed[i]])))
    held = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    num_blocks = sum(needed) + 4
    cache = PagedKVCache(SHAPE, num_blocks=num_blocks, block_size=size, dtype=held, compute_dtype=torch.float32)
    return World(cache, window, StepPlan(0, tuple(slices), ()), draw(st.sampled_from([1, 30, 300, 1 << 22])))


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_ragged_paged_attention_equals_plain_attention_in_a_cache_full_of_nan(world: World) -> None:
    with torch.inference_mode():
        assert world.run() < 1e-5


def test_many_decodes_of_very_different_lengths_share_few_products_with_little_padding() -> None:
    size = 16
    starts = [3 + 37 * i % 480 for i in range(64)]
    cache = PagedKVCache(SHAPE, num_blocks=64 * 31 + 1, block_size=size, dtype=torch.float32)
    slices, block = [], 1
    for i, start in enumerate(starts):
        num = -(-(start + 1) // size)
        slices.append(make_slice(f"r{i}", start, 1, list(range(block, block + num))))
        block += num
    inputs = build_inputs(StepPlan(0, tuple(slices), ()), cache, sliding_window=None)
    groups = inputs.attention.decodes
    assert sum(group.num_rows for group in groups) == 64
    assert len(groups) <= 12
    gathered = sum(group.blocks.shape[0] for group in groups)
    assert gathered <= 1.25 * (block - 1)
    assert all(group.blocks.shape[0] <= cache.max_gather_blocks for group in groups)


def test_a_group_never_exceeds_the_workspace_even_if_one_row_fills_it() -> None:
    shape = replace(SHAPE, num_kv_heads=64, head_dim=128, num_query_heads=64, max_model_len=4096, num_layers=1)
    cache = PagedKVCache(shape, num_blocks=600, block_size=16, dtype=torch.float32)
    slices = [make_slice(f"r{i}", 4095, 1, list(range(1, 257))) for i in range(2)]
    groups = build_inputs(StepPlan(0, tuple(slices), ()), cache, sliding_window=None).attention.decodes
    assert [group.num_rows for group in groups] == [1, 1]
    assert all(group.blocks.shape[0] <= cache.max_gather_blocks for group in groups)


def test_a_window_reads_only_the_blocks_it_reaches() -> None:
    cache = PagedKVCache(SHAPE, num_blocks=200, block_size=4, dtype=torch.float32)
    decode = make_slice("d", 399, 1, list(range(1, 101)))
    prefill = make_slice("p", 380, 20, list(range(101, 201)))
    attention = build_inputs(StepPlan(0, (prefill, decode), ()), cache, sliding_window=6).attention
    assert attention.decodes[0].blocks.tolist() == [99, 100]
    assert attention.prefills[0].blocks is not None
    assert attention.prefills[0].blocks_start == 372
    assert attention.prefills[0].blocks.shape[0] == 7


def test_the_cache_takes_the_bytes_that_the_accountant_counts() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = PagedKVCache(SHAPE, num_blocks=10, block_size=4, dtype=dtype)
        layout = KVLayout(
            num_layers=SHAPE.num_layers,
            num_kv_heads=SHAPE.num_kv_heads,
            head_dim=SHAPE.head_dim,
            bytes_per_element=dtype.itemsize,
            block_size=4,
        )
        assert cache.num_bytes == 10 * layout.bytes_per_block


def test_the_workspace_holds_a_request_of_full_length_and_at_least_a_few_megabytes() -> None:
    mixtral = replace(SHAPE, num_layers=1, num_kv_heads=8, head_dim=128, max_model_len=32768)
    assert gather_blocks(mixtral, 100_000, 16, 2) == 2048
    assert gather_blocks(mixtral, 100, 16, 2) == 100
    assert gather_blocks(replace(mixtral, max_model_len=16), 100_000, 16, 2) == 64
    cache = PagedKVCache(SHAPE, num_blocks=10, block_size=4, dtype=torch.float32)
    assert cache.workspace_bytes <= 4 << 20
    bf16, fp32 = torch.bfloat16, torch.float32
    mixed = PagedKVCache(SHAPE, num_blocks=10, block_size=4, dtype=bf16, compute_dtype=fp32)
    alike = PagedKVCache(SHAPE, num_blocks=10, block_size=4, dtype=bf16)
    assert mixed.workspace_bytes == 3 * alike.workspace_bytes  # as held, and converted


def test_a_mask_for_the_ragged_row_is_our_own_bug() -> None:
    cache = PagedKVCache(SHAPE, num_blocks=4, block_size=4, dtype=torch.float32)
    inputs = build_inputs(StepPlan(0, (make_slice("r", 0, 1, [1]),), ()), cache, sliding_window=None)
    row = torch.zeros(1, 4, 1, 6)
    with pytest.raises(AssertionError, match="ragged row"):
        paged_attention_forward(SimpleNamespace(layer_idx=0), row, row, row, torch.zeros(1), 1.0, step=inputs.attention)


def test_rows_are_a_permutation_of_the_plans_tokens_with_their_positions_and_slots() -> None:
    cache = PagedKVCache(SHAPE, num_blocks=40, block_size=4, dtype=torch.float32)
    parts = [
        make_slice("a", 5, 6, [9, 3, 7]),
        make_slice("b", 0, 1, [5]),
        make_slice("c", 0, 4, [2]),
        make_slice("d", 13, 1, [20, 21, 22, 23]),
        make_slice("e", 3, 2, [30, 31]),
    ]
    inputs = build_inputs(StepPlan(0, tuple(parts), ()), cache, sliding_window=None)
    assert inputs.input_ids.shape == inputs.positions.shape == (1, 14)
    for part, first in zip(parts, inputs.first_rows, strict=True):
        positions = list(range(part.start, part.start + part.num_tokens))
        rows = slice(first, first + part.num_tokens)
        assert inputs.positions[0, rows].tolist() == positions
        assert inputs.input_ids[0, rows].tolist() == [position % 8 for position in positions]
        slots = [part.block_table[position // 4] * 4 + position % 4 for position in positions]
        assert inputs.attention.slots[rows].tolist() == slots
    # Begun here and not filled here: a's third block, b's first, e's second; d writes into the middle of a block.
    assert sorted(inputs.fresh_blocks) == [5, 7, 31]
