"""Norms and the router: near float64, the same bits in any batch, for any threads and on all instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels import native
from mixtral_serve.kernels.native import Isa, limited_to
from mixtral_serve.kernels.native_rowwise import rotary_table

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")

EPS = 1e-5
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([128, 1000, 4096]))


@contextmanager
def threads(num: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(*dims: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*dims, generator=torch.Generator().manual_seed(seed)) * scale


def isas() -> list[Isa]:
    return [isa for isa in Isa if isa <= native.best_isa()]


def bits(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.view(torch.int32) for tensor in tensors]


def assert_rows_keep_their_bits(
    operator: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], rows: torch.Tensor, order: torch.Tensor
) -> None:
    """Alone, in a shuffled batch, with 1 to 8 threads, on each instruction set."""
    wanted = bits(operator(rows))
    for row in range(min(3, rows.shape[0])):
        alone = bits(operator(rows[row : row + 1]))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, wanted, strict=True))
    shuffled = bits(operator(rows[order]))
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, wanted, strict=True))
    for isa in isas():
        for num_threads in (1, 2, 5, 8):
            with threads(num_threads), limited_to(isa):
                found = bits(operator(rows))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (isa, num_threads)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), WIDTHS, st.integers(0, 1000), st.sampled_from([1e-20, 1e-3, 1.0, 1e15]))
def test_rms_norm_is_right_and_keeps_its_bits(num_rows: int, width: int, seed: int, scale: float) -> None:
    rows, weight = randn(num_rows, width, seed=seed, scale=scale), randn(width, seed=seed + 1)
    exact = rows.double()
    wanted = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt()

    def norm(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops.mixtral_serve.rms_norm(x, weight, EPS),)

    assert torch.allclose(norm(rows)[0].double(), wanted, rtol=2e-6, atol=0)
    assert_rows_keep_their_bits(norm, rows, torch.randperm(num_rows))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), WIDTHS, st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_the_router_is_right_and_keeps_its_bits(num_rows: int, width: int, num_experts: int, k: int, seed: int) -> None:
    k = min(k, num_experts)
    hidden, gate = randn(num_rows, width, seed=seed), randn(num_experts, width, seed=seed + 1, scale=width**-0.5)

    def route(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, experts = torch.ops.mixtral_serve.route(x, gate, k)
        return logits, weights, experts

    logits, weights, experts = route(hidden)
    assert torch.allclose(logits.double(), hidden.double() @ gate.double().T, atol=1e-5)
    chosen = logits.double().softmax(-1).gather(1, experts)
    assert torch.allclose(weights.double(), chosen / chosen.sum(-1, keepdim=True), atol=1e-6)
    assert (weights.diff(dim=1) <= 0).all()
    best = logits.topk(k).values
    assert torch.allclose(logits.gather(1, experts), best, atol=1e-6)
    assert_rows_keep_their_bits(route, hidden, torch.randperm(num_rows))


def test_equal_experts_are_chosen_by_the_lowest_id() -> None:
    gate = torch.ones(6, 32)
    gate[4] = 2
    _, weights, experts = torch.ops.mixtral_serve.route(torch.full((3, 32), 0.01), gate, 3)
    assert experts.tolist() == [[4, 0, 1]] * 3
    assert weights.sum(-1).tolist() == pytest.approx([1] * 3)
    _, weights, experts = torch.ops.mixtral_serve.route(torch.ones(1, 32) * 1e4, gate, 2)
    assert (experts.tolist(), weights.tolist()) == ([[4, 0]], [[1.0, 0.0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_alone_and_names_experts_that_exist(bad: float) -> None:
    hidden, gate = randn(5, 40, seed=1), randn(8, 40, seed=2)
    wanted = torch.ops.mixtral_serve.route(hidden, gate, 2)
    normed = torch.ops.mixtral_serve.rms_norm(hidden, gate[0], EPS)
    hidden[2, 7] = bad
    found = torch.ops.mixtral_serve.route(hidden, gate, 2)
    assert found[1][2].isnan().all()
    assert 0 <= int(found[2][2].min()) < int(found[2][2].max()) < 8
    others = [0, 1, 3, 4]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(found, wanted, strict=True))
    spoilt = torch.ops.mixtral_serve.rms_norm(hidden, gate[0], EPS)
    assert torch.equal(spoilt[others], normed[others])
    assert not torch.isfinite(spoilt[2, 7])


def test_any_shape_and_stride_of_rows_is_normed() -> None:
    rows, weight = randn(2, 3, 20, seed=3), randn(20, seed=4)
    flat = torch.ops.mixtral_serve.rms_norm(rows.view(6, 20), weight, EPS)
    assert torch.equal(torch.ops.mixtral_serve.rms_norm(rows, weight, EPS), flat.view(2, 3, 20))
    turned = rows.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(torch.ops.mixtral_serve.rms_norm(turned, weight, EPS), flat.view(2, 3, 20))
    assert torch.ops.mixtral_serve.rms_norm(rows[:0], weight, EPS).shape == (0, 3, 20)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 8).double(), torch.zeros(8)),
        (torch.zeros(2, 8), torch.zeros(7)),
        (torch.zeros(2, 8), torch.zeros(8).bfloat16()),
        (torch.zeros(2, 8), torch.zeros(16)[::2]),
        (torch.zeros(()), torch.zeros(())),
    ],
)
def test_a_norm_of_other_tensors_is_refused(arguments: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="rms_norm"):
        torch.ops.mixtral_serve.rms_norm(*arguments, EPS)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 8).double(), torch.zeros(4, 8), 2),
        (torch.zeros(1, 2, 8), torch.zeros(4, 8), 2),
        (torch.zeros(2, 8), torch.zeros(4, 7), 2),
        (torch.zeros(2, 8), torch.zeros(8, 4).T, 2),
        (torch.zeros(2, 8), torch.zeros(4, 8), 0),
        (torch.zeros(2, 8), torch.zeros(4, 8), 5),
        (torch.zeros(2, 8), torch.zeros(257, 8), 2),
    ],
)
def test_a_router_of_other_tensors_is_refused(arguments: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    with pytest.raises(ValueError, match="route"):
        torch.ops.mixtral_serve.route(*arguments)


def test_the_rotary_table_is_within_half_a_unit_of_the_angle_that_fp32_gives() -> None:
    frequencies = 1.0 / (1e6 ** (torch.arange(0, 128, 2) / 128))
    cosine, sine = rotary_table(frequencies, 3000)
    angles = (torch.arange(3000.0)[:, None] * frequencies).double()
    assert torch.equal(cosine, angles.cos().float())
    assert torch.equal(sine, angles.sin().float())
    assert rotary_table(frequencies, 0)[0].shape == (0, 64)
    with pytest.raises(ValueError, match="frequencies must be dense fp32"):
        rotary_table(frequencies.double(), 10)
    with pytest.raises(ValueError, match="num_positions"):
        rotary_table(frequencies, -1)


def test_they_are_proper_operators() -> None:
    rows, weight = randn(3, 40, seed=5), randn(40, seed=6)
    torch.library.opcheck(torch.ops.mixtral_serve.rms_norm.default, (rows, weight, EPS))
    torch.library.opcheck(torch.ops.mixtral_serve.route.default, (rows, randn(8, 40, seed=7), 2))
