"""``experts_int8`` and ``experts_int4``: close to plain experts, and the same bits wherever a row is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels import native, native_products
from mixtral_serve.kernels.formats import Kind, PackedMatrix, dequantize, quantize
from mixtral_serve.kernels.native import Isa, limited_to
from mixtral_serve.kernels.native_products import KernelArgumentError, experts_scratch_bytes

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")

KINDS: tuple[Kind, ...] = ("int8", "int4")
NUM_EXPERTS, TOP_K = 8, 2


def isas() -> list[Isa]:
    return [isa for isa in Isa if isa <= native.best_isa()]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    """Packed experts: w1, w2, w3, each [experts, ...]."""

    w1: PackedMatrix
    w2: PackedMatrix
    w3: PackedMatrix

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for matrix in (self.w1, self.w2, self.w3) for tensor in (matrix.quants, matrix.scales))

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        operator: Callable[..., torch.Tensor] = getattr(torch.ops.mixtral_serve, f"experts_{self.w1.kind}")
        return operator(hidden, ids, weights, *self.tensors)


@cache
def layer(kind: Kind, width: int, inner: int) -> Layer:
    matrices = []
    for seed, (rows, cols) in enumerate(((inner, width), (width, inner), (inner, width))):
        packed = PackedMatrix.empty(kind, rows, cols, num_matrices=NUM_EXPERTS)
        for expert in range(NUM_EXPERTS):
            packed[expert].copy_(quantize(randn(rows, cols, seed=10 * seed + expert) / cols**0.5, kind))
        matrices.append(packed)
    return Layer(*matrices)


def routing(rows: int, seed: int, num_experts: int = NUM_EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Different experts for each row, and weights that sum to 1."""
    scores = randn(rows, num_experts, seed=seed)
    weights, ids = scores.softmax(dim=1).topk(TOP_K, dim=1)
    return ids, weights / weights.sum(dim=1, keepdim=True)


def quantized(x: torch.Tensor) -> torch.Tensor:
    """Rows as they are after their quantisation to 8 bits, float64."""
    largest = x.abs().amax(dim=1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # 127 / largest would be rounded twice
    return torch.where(largest > 0, (x * inverse).round(), 0).double() * (largest / 127).double()


def reference(experts: Layer, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Plain experts on dequantised weights in float64, activations quantised where the kernel quantises them."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for expert in range(NUM_EXPERTS):
        w1, w2, w3 = (dequantize(matrix[expert]).double() for matrix in (experts.w1, experts.w2, experts.w3))
        rows, places = (ids == expert).nonzero(as_tuple=True)
        if len(rows) > 0:
            x = quantized(hidden[rows])
            inner = torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)
            out.index_add_(0, rows, weights[rows, places].double().unsqueeze(1) * (quantized(inner.float()) @ w2.T))
    return out


@pytest.mark.parametrize("kind", KINDS)
@given(
    width=st.sampled_from([16, 64, 70, 100]),
    inner=st.sampled_from([16, 48, 130]),
    rows=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_experts_are_close_to_float64_and_the_same_on_every_instruction_set(
    kind: Kind, width: int, inner: int, rows: int, seed: int
) -> None:
    experts, hidden = layer(kind, width, inner), randn(rows, width, seed=seed)
    ids, weights = routing(rows, seed + 1)
    results = []
    for isa in isas():
        with limited_to(isa):
            results.append(experts(hidden, ids, weights))
    expected = reference(experts, hidden, ids, weights)
    # An intermediate value that lies between two of its 255 steps may be rounded to either: one step of one column.
    steps = 2.0 / 127 * expected.abs().amax()
    assert float((results[0].double() - expected).abs().amax()) <= steps
    # Few values do, so that the mean is far below a step unless there are few rows to take it of.
    mean = max(1e-4, 2e-3 / rows)
    assert float((results[0].double() - expected).abs().mean()) <= mean * float(expected.abs().amax())
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name.lower())
def test_row_has_the_same_bits_alone_and_at_any_place_of_any_batch(kind: Kind, isa: Isa) -> None:
    if isa not in isas():
        pytest.skip(f"this CPU has no {isa.name}")
    experts, hidden = layer(kind, 100, 130), randn(60, 100)
    ids, weights = routing(60, seed=1)
    with limited_to(isa):
        alone = torch.cat([experts(hidden[[i]], ids[[i]], weights[[i]]) for i in range(60)])
        for size in (2, 3, 5, 12, 13, 31, 60):
            assert torch.equal(experts(hidden[:size], ids[:size], weights[:size]), alone[:size])
        order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
        assert torch.equal(experts(hidden[order], ids[order], weights[order]), alone[order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [257, 400])
def test_one_expert_may_have_all_rows_of_a_pass(kind: Kind, rows: int) -> None:
    experts, hidden = layer(kind, 100, 130), randn(rows, 100)
    ids, weights = torch.tensor([[5, 2]]).repeat(rows, 1), torch.tensor([[0.75, 0.25]]).repeat(rows, 1)
    for isa in isas():
        with limited_to(isa):
            together = experts(hidden, ids, weights)
            for i in (0, 127, 255, 256, rows - 1):
                assert torch.equal(together[[i]], experts(hidden[[i]], ids[[i]], weights[[i]]))


@pytest.mark.parametrize("kind", KINDS)
def test_order_in_which_a_row_names_its_experts_changes_no_bit(kind: Kind) -> None:
    experts, hidden = layer(kind, 64, 48), randn(20, 64)
    ids, weights = routing(20, seed=1)
    swapped = experts(hidden, ids.flip(1).contiguous(), weights.flip(1).contiguous())
    assert torch.equal(experts(hidden, ids, weights), swapped)


@pytest.mark.parametrize("kind", KINDS)
def test_result_has_the_same_bits_for_one_to_eight_threads(kind: Kind) -> None:
    experts, hidden = layer(kind, 100, 130), randn(50, 100)
    ids, weights = routing(50, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            results.append(experts(hidden, ids, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_nobody_chose_are_not_read(kind: Kind) -> None:
    experts, hidden = layer(kind, 64, 48), randn(30, 64)
    ids, weights = routing(30, seed=1, num_experts=3)
    poisoned = [tensor.clone() for tensor in experts.tensors]
    for scales in poisoned[1::2]:
        scales[3:].view(torch.float32)[:] = float("nan")  # of int4 the multipliers as well, whatever they become
    operator = getattr(torch.ops.mixtral_serve, f"experts_{kind}")
    assert torch.equal(operator(hidden, ids, weights, *poisoned), experts(hidden, ids, weights))


def test_threads_that_come_late_to_a_phase_miss_nothing_and_nobody_waits_for_ever() -> None:
    """Many more threads than cores: in hundreds of calls of five phases some arrive when others are done."""
    experts, hidden = layer("int8", 64, 48), randn(5, 64)
    ids, weights = routing(5, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = experts(hidden, ids, weights)
        torch.set_num_threads(12)
        assert all(torch.equal(experts(hidden, ids, weights), alone) for _ in range(300))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_one_pass_are_computed_like_the_others(kind: Kind) -> None:
    rows = native_products.PASS_ROWS + 7
    experts, hidden = layer(kind, 16, 16), randn(rows, 16)
    ids, weights = routing(rows, seed=1)
    assert torch.equal(experts(hidden, ids, weights)[-7:], experts(hidden[-7:], ids[-7:], weights[-7:]))
    sizes = (16, TOP_K, NUM_EXPERTS, 1)
    assert experts_scratch_bytes(kind, rows, *sizes) == experts_scratch_bytes(kind, rows - 7, *sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_give_nan_and_touch_no_neighbour(kind: Kind, bad: float) -> None:
    experts, hidden = layer(kind, 64, 48), randn(20, 64)
    ids, weights = routing(20, seed=1)
    plain = experts(hidden, ids, weights)
    hidden[11, 5] = bad
    result = experts(hidden, ids, weights)
    assert bool(result[11].isnan().all())
    others = torch.arange(20) != 11
    assert torch.equal(result[others], plain[others])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_zeros(kind: Kind) -> None:
    experts = layer(kind, 64, 48)
    ids, weights = routing(3, seed=1)
    assert bool((experts(torch.zeros(3, 64), ids, weights) == 0).all())
    assert experts(torch.empty(0, 64), ids[:0], weights[:0]).shape == (0, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, NUM_EXPERTS, 2**40])
def test_ids_of_no_expert_are_refused(kind: Kind, wrong: int) -> None:
    experts, hidden = layer(kind, 64, 48), randn(5, 64)
    ids, weights = routing(5, seed=1)
    ids[4, 1] = wrong
    with pytest.raises(KernelArgumentError, match=r"^ids must lie in 0\.\.7"):
        experts(hidden, ids, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_keeps_pytorchs_rules(kind: Kind) -> None:
    experts, hidden = layer(kind, 64, 48), randn(3, 64)
    ids, weights = routing(3, seed=1)
    operator = getattr(torch.ops.mixtral_serve, f"experts_{kind}").default
    arguments = (hidden, ids, weights, *experts.tensors)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("index", "wrong", "named"),
    [
        (0, torch.ones(5, 64, dtype=torch.bfloat16), "hidden"),
        (0, torch.ones(5, 128)[:, ::2], "hidden"),
        (0, torch.ones(64), "hidden"),
        (0, torch.ones(5, 96), "w1_quants"),
        (1, torch.zeros(5, 2, dtype=torch.int32), "ids"),
        (1, torch.zeros(4, 2, dtype=torch.int64), "ids"),
        (1, torch.zeros(5, dtype=torch.int64), "ids"),
        (1, torch.zeros(5, 0, dtype=torch.int64), "ids"),
        (1, torch.zeros(5, native_products.MAX_CHOSEN + 1, dtype=torch.int64), "ids"),
        (2, torch.ones(5, 3), "weights"),
        (2, torch.ones(5, 2, dtype=torch.float64), "weights"),
        (3, torch.ones(3, 2, 256, dtype=torch.uint8), "w1_quants"),
        (4, torch.ones(8, 3, 16, dtype=torch.float16), "w1_scales"),
        (5, torch.ones(8, 4, 1, 256, dtype=torch.uint8), "w2_quants"),
        (6, torch.ones(2), "w2_scales"),
        (7, torch.ones(7, 3, 2, 256, dtype=torch.uint8), "w3_quants"),
        (8, torch.ones(8, 3, 2, 16, dtype=torch.float64), "w3_scales"),
    ],
)
def test_wrong_arguments_are_refused_by_name(kind: Kind, index: int, wrong: torch.Tensor, named: str) -> None:
    ids, weights = routing(5, seed=1)
    arguments = [randn(5, 64), ids, weights, *layer(kind, 64, 48).tensors]
    arguments[index] = wrong
    with pytest.raises(KernelArgumentError, match=rf"^{named} must"):
        getattr(torch.ops.mixtral_serve, f"experts_{kind}")(*arguments)
