"""Compiled attention: right within a stated bound, and the same bits for a row whatever surrounds it.

A world is some requests with random queries, keys and values for every position. A schedule cuts each into slices and
says which slices share a step; the law is that no schedule, block table, number of threads or instruction set changes a
bit of any row's result.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels import native
from mixtral_serve.kernels.native import Isa, limited_to
from mixtral_serve.kernels.native_attention import SPLIT_KEYS
from mixtral_serve.model.attention import paged_attention_forward
from mixtral_serve.model.batch import build_inputs
from mixtral_serve.model.native_kv_cache import NativeKVCache
from mixtral_serve.model.shape import KV_BYTES_PER_ELEMENT, KV_SCALE_BYTES, KVDtype, ModelShape
from scheduler.accountant import KVLayout
from scheduler.plan import ScheduledSlice, StepPlan
from scheduler.request import BlockId, RequestId

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")

DTYPES: tuple[KVDtype, ...] = ("fp32", "bf16", "int8")
SHAPE = ModelShape(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=16,
    num_experts=2,
    num_experts_per_token=1,
    max_model_len=4096,
)


@dataclass(frozen=True)
class World:
    """Requests r0, r1, ... with [positions, heads, head_dim] queries, keys and values each."""

    shape: ModelShape
    lengths: tuple[int, ...]
    window: int | None = None
    dtype: KVDtype = "fp32"
    seed: int = 0
    scale: float = 1.0
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.shape.num_query_heads, self.shape.num_kv_heads, self.shape.num_kv_heads)
        for num in self.lengths:
            parts = [torch.randn(num, each, self.shape.head_dim, generator=generator) * self.scale for each in heads]
            self.rows.append((parts[0], parts[1], parts[2]))


@dataclass(frozen=True)
class Storage:
    """Where and how a world is computed."""

    block_size: int = 16
    order: int = 0
    """Seed of the permutation of block ids; 0: ascending."""
    num_threads: int = 1
    isa: Isa | None = None


Step = Sequence[tuple[int, int, int]]
"""(request, first position, tokens) of each slice."""


@contextmanager
def threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tables(lengths: Sequence[int], size: int, order: int) -> tuple[list[list[int]], int]:
    """Block tables, and blocks in all (a few of them nobody's)."""
    needed = [-(-length // size) for length in lengths]
    num = sum(needed) + 4
    ids = list(range(1, num))
    if order:
        ids = [ids[i] for i in torch.randperm(num - 1, generator=torch.Generator().manual_seed(order)).tolist()]
    return [ids[sum(needed[:i]) : sum(needed[: i + 1])] for i in range(len(lengths))], num


def compute(world: World, steps: Sequence[Step], storage: Storage | None = None) -> list[torch.Tensor]:
    """Results [positions, query heads, head_dim] of each request; NaN where no step computed a position."""
    storage = storage or Storage()
    found = [torch.full_like(queries, math.nan) for queries, _, _ in world.rows]
    table, num_blocks = tables(world.lengths, storage.block_size, storage.order)
    with threads(storage.num_threads), limited_to(native.best_isa() if storage.isa is None else storage.isa):
        cache = NativeKVCache(world.shape, num_blocks=num_blocks, block_size=storage.block_size, dtype=world.dtype)
        cache.poison()
        for step in steps:
            run_step(world, cache, step, table, found)
    return found


def run_step(world: World, cache: NativeKVCache, step: Step, table: list[list[int]], found: list[torch.Tensor]) -> None:
    slices = []
    for request, start, num in step:
        blocks = [BlockId(block) for block in table[request]]
        tokens = array("i", [1]) * (start + num)
        slices.append(ScheduledSlice(RequestId(f"r{request}"), start, num, tokens, blocks, 1, True, 0))
    inputs = build_inputs(StepPlan(0, tuple(slices), ()), cache, sliding_window=world.window)
    assert inputs.fresh_blocks == ()
    order = sorted(range(len(step)), key=lambda i: inputs.first_rows[i])
    spans = [(step[i][0], slice(step[i][1], step[i][1] + step[i][2])) for i in order]
    rows = [torch.cat([world.rows[request][part][span] for request, span in spans]) for part in range(3)]
    out, weights = paged_attention_forward(
        SimpleNamespace(layer_idx=1),
        *(row.transpose(0, 1).unsqueeze(0) for row in rows),
        None,
        world.shape.head_dim**-0.5,
        world.window,
        step=inputs.attention,
        dropout=0.0,
    )
    assert weights is None
    first = 0
    for request, span in spans:
        num = span.stop - span.start
        found[request][span] = out[0, first : first + num]
        first += num


def at_once(world: World) -> list[Step]:
    return [[(request, 0, length)] for request, length in enumerate(world.lengths)]


def token_by_token(world: World) -> list[Step]:
    return [
        [(request, position, 1) for request, length in enumerate(world.lengths) if position < length]
        for position in range(max(world.lengths))
    ]


def same_bits(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, wanted, strict=True))


def as_held(vectors: torch.Tensor, dtype: KVDtype) -> torch.Tensor:
    """What keys or values [tokens, heads, head_dim] are once they were stored, in float64."""
    if dtype == "fp32":
        return vectors.double()
    if dtype == "bf16":
        return vectors.bfloat16().double()
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    quants = (vectors * (torch.full_like(largest, 127) / largest)).round()  # a number over a tensor rounds twice
    return torch.where(largest > 0, quants.double() * (largest / 127).double(), 0)


def reference(world: World, request: int) -> torch.Tensor:
    """The same in float64, with a score matrix, from keys and values as they are held."""
    queries, keys, values = world.rows[request]
    per_kv_head = queries.shape[1] // keys.shape[1]
    held_keys, held_values = (as_held(part, world.dtype) for part in (keys, values))
    at = torch.arange(queries.shape[0])
    hidden = (at[None, :] > at[:, None]) | (at[None, :] <= at[:, None] - (world.window or 1 << 30))
    heads = []
    for head in range(queries.shape[1]):  # one at a time: the scores of all may take half a gigabyte
        kv_head = head // per_kv_head
        scores = queries[:, head].double() @ held_keys[:, kv_head].T * world.shape.head_dim**-0.5
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ held_values[:, kv_head])
    return torch.stack(heads, dim=1)


def worst_error(world: World, found: list[torch.Tensor]) -> float:
    errors = [float((found[i] - reference(world, i)).abs().max()) for i in range(len(world.lengths))]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return replace(
        SHAPE,
        num_kv_heads=num_kv_heads,
        num_query_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 4, 6, 9, 70])),
        head_dim=draw(st.sampled_from([1, 6, 16, 24, 40, 64])),
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    lengths = st.one_of(st.integers(1, 90), st.integers(SPLIT_KEYS - 3, SPLIT_KEYS + 40))
    return World(
        draw(shapes()),
        tuple(draw(st.lists(lengths, min_size=1, max_size=3))),
        window=draw(st.sampled_from([None, None, 1, 2, 7, 33, 300])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def schedules(draw: st.DrawFn, world: World) -> list[Step]:
    """Chunks of any size, of several requests or of one in a step; long requests in few chunks."""
    done = [0] * len(world.lengths)
    steps: list[Step] = []
    while any(now < length for now, length in zip(done, world.lengths, strict=True)):
        step = []
        for request, length in enumerate(world.lengths):
            left = length - done[request]
            if left and (draw(st.booleans()) or not step):
                most = left if left > 100 else min(left, draw(st.sampled_from([1, 1, 3, 17, 64])))
                num = draw(st.integers(max(1, most - 60), most))
                step.append((request, done[request], num))
                done[request] += num
        steps.append(draw(st.permutations(step)))
    return steps


@st.composite
def storages(draw: st.DrawFn) -> Storage:
    return Storage(
        block_size=draw(st.sampled_from([1, 3, 16, 20, 32, 48])),
        order=draw(st.integers(0, 5)),
        num_threads=draw(st.integers(1, 4)),
        isa=draw(st.sampled_from([isa for isa in Isa if isa <= native.best_isa()])) if native.is_available() else None,
    )


def check_one_world(data: st.DataObject) -> None:
    world = data.draw(worlds())
    steps = data.draw(schedules(world))
    storage = data.draw(storages())
    alone = compute(world, at_once(world))
    assert same_bits(compute(world, steps, storage), alone)
    assert worst_error(world, alone) < 1e-5


EASY = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=15, deadline=None, suppress_health_check=EASY)
@given(st.data())
def test_a_row_has_the_same_bits_under_any_schedule_on_any_blocks_threads_and_instructions(data: st.DataObject) -> None:
    check_one_world(data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=EASY)
@given(st.data())
def test_a_row_has_the_same_bits_in_five_hundred_worlds(data: st.DataObject) -> None:
    check_one_world(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 600])
def test_a_decode_over_several_splits_has_the_bits_of_the_prefill_for_1_to_8_threads(dtype, window) -> None:
    world = World(replace(SHAPE, head_dim=40), (2 * SPLIT_KEYS + 77, 3, SPLIT_KEYS + 1), window=window, dtype=dtype)
    alone = compute(world, at_once(world))
    assert worst_error(world, alone) < 1e-5
    last = [(i, length - 1, 1) for i, length in enumerate(world.lengths)]
    before = [[(i, 0, length - 1)] for i, length in enumerate(world.lengths)]
    for num_threads in range(1, 9):
        found = compute(world, [*before, last], Storage(order=num_threads, num_threads=num_threads))
        assert same_bits(found, alone), num_threads


def test_splits_without_room_for_partial_results_have_the_same_bits() -> None:
    world = World(SHAPE, tuple([SPLIT_KEYS + 9] * 5))
    steps: list[Step] = [*([(i, 0, SPLIT_KEYS + 8)] for i in range(5)), [(i, SPLIT_KEYS + 8, 1) for i in range(5)]]
    assert same_bits(compute(world, steps), compute(world, at_once(world)))
    num_blocks = tables(world.lengths, 16, 0)[1]
    cache = NativeKVCache(SHAPE, num_blocks=num_blocks, block_size=16, dtype="fp32")
    assert cache.max_partials < 2 * 5, "all five decodes are split; make them longer"


def test_token_by_token_is_one_prefill() -> None:
    world = World(SHAPE, (70, 33, 1), dtype="bf16")
    assert same_bits(compute(world, token_by_token(world)), compute(world, at_once(world)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_instruction_sets_give_the_same_bits_at_mixtrals_heads(dtype) -> None:
    shape = replace(SHAPE, num_query_heads=8, num_kv_heads=2, head_dim=128)
    world = World(shape, (SPLIT_KEYS + 70, 40), dtype=dtype)
    found = [compute(world, at_once(world), Storage(isa=isa, num_threads=2)) for isa in Isa if isa <= native.best_isa()]
    assert all(same_bits(each, found[0]) for each in found)
    assert worst_error(world, found[0]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_held_keys_and_values_is_that_of_rounding_them(dtype) -> None:
    """Against float64 over what was given, not over what is held: fp32 1e-5, bf16 2e-2, int8 3e-2 for unit normals."""
    world = World(replace(SHAPE, head_dim=128), (200,), dtype=dtype)
    wanted = reference(replace(world, dtype="fp32"), 0)
    error = float((compute(world, at_once(world))[0] - wanted).abs().max())
    assert error < {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2}[dtype]


def test_huge_scores_neither_overflow_nor_lose_the_largest() -> None:
    world = World(SHAPE, (SPLIT_KEYS + 60,), scale=200.0)
    found = compute(world, at_once(world))
    assert torch.isfinite(found[0]).all()
    # Scores of 100,000 are known to a hundredth in fp32, so weights to a hundredth of themselves.
    assert worst_error(world, found) < 0.01 * 200
    assert same_bits(compute(world, [[(0, 0, 500)], [(0, 500, 71)], [(0, 571, 1)]]), found)


def test_equal_keys_give_the_mean_of_the_values_and_a_context_of_one_its_only_value() -> None:
    world = World(SHAPE, (SPLIT_KEYS + 5,))
    world.rows[0][1][:] = world.rows[0][1][0]
    found = compute(world, at_once(world))[0]
    values = world.rows[0][2].repeat_interleave(4, dim=1)
    means = values.cumsum(0) / torch.arange(1, values.shape[0] + 1)[:, None, None]
    assert torch.allclose(found, means, atol=1e-5)
    assert torch.equal(found[0], values[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_key_or_value_spoils_those_who_see_it_and_nobody_else(dtype, bad) -> None:
    world = World(SHAPE, (60, 40), dtype=dtype, window=20)
    wanted = compute(world, at_once(world))
    # Minus infinity is a score like others, of weight 0: an infinite key spoils a row only where it is the winner.
    for part in (1, 2) if math.isnan(bad) or dtype == "int8" else (2,):
        spoiled = World(SHAPE, (60, 40), dtype=dtype, window=20)
        spoiled.rows[0][part][25, 0, 3] = bad
        for steps in (at_once(spoiled), token_by_token(spoiled)):
            found = compute(spoiled, steps, Storage(block_size=48))
            assert not torch.isfinite(found[0][25:45, :4]).all(dim=-1).any()
            found[0][25:45, :4] = wanted[0][25:45, :4]
            assert same_bits(found, wanted)


def test_zeros_are_zeros_in_every_form() -> None:
    for dtype in DTYPES:
        world = World(SHAPE, (5,), dtype=dtype, scale=0.0)
        assert not compute(world, at_once(world))[0].any()


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 3e-38])
def test_int8_holds_vectors_too_small_to_scale_as_zeros_or_rightly(tiny) -> None:
    world = World(SHAPE, (5,), dtype="int8", scale=tiny)
    assert worst_error(replace(world, dtype="fp32"), compute(world, at_once(world))) <= 5 * tiny


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_takes_the_bytes_that_the_accountant_counts(dtype) -> None:
    cache = NativeKVCache(SHAPE, num_blocks=10, block_size=4, dtype=dtype)
    layout = KVLayout(
        num_layers=SHAPE.num_layers,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        bytes_per_element=KV_BYTES_PER_ELEMENT[dtype],
        block_size=4,
        scale_bytes=KV_SCALE_BYTES[dtype],
    )
    assert cache.num_bytes == 10 * layout.bytes_per_block
    assert 0 < cache.workspace_bytes < 1 << 20


def test_the_workspace_stays_small_for_long_contexts_of_mixtral() -> None:
    mixtral = replace(SHAPE, num_layers=1, num_query_heads=32, num_kv_heads=8, head_dim=128, max_model_len=32768)
    with threads(2):
        cache = NativeKVCache(mixtral, num_blocks=16_384, block_size=16, dtype="int8")
    assert cache.max_partials * SPLIT_KEYS > 200_000
    assert cache.workspace_bytes < 9 << 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_cleared_blocks_are_zeros_and_poisoned_ones_poison(dtype) -> None:
    world = World(SHAPE, (20,), dtype=dtype)
    table, num_blocks = tables(world.lengths, 16, 0)
    cache = NativeKVCache(SHAPE, num_blocks=num_blocks, block_size=16, dtype=dtype)
    found = [torch.full_like(world.rows[0][0], math.nan)]
    run_step(world, cache, [(0, 0, 19)], table, found)
    cache.poison([table[0][0]])
    run_step(world, cache, [(0, 19, 1)], table, found)
    assert found[0][19].isnan().all()
    cache.clear(table[0])
    run_step(world, cache, [(0, 19, 1)], table, found)
    share = (world.rows[0][0][19].view(2, 4, 16) * as_held(world.rows[0][1], dtype)[19][:, None]).sum(-1) / 4
    weight = share.exp() / (share.exp() + 19)
    wanted = weight[..., None] * as_held(world.rows[0][2], dtype)[19][:, None]
    assert torch.allclose(found[0][19].double(), wanted.view(8, 16), atol=1e-5)
