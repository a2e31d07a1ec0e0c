"""Every backend computes what the reference computes, up to rounding, whatever the shapes and the values."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.formats import Kind, PackedMatrix, dequantize
from mixtral_serve.kernels.quantizer import quantize_into, quantize_matrix
from mixtral_serve.kernels.reference_backend import EIGHT_BITS, ReferenceBackend, quantize_rows
from mixtral_serve.kernels.registry import BACKENDS
from mixtral_serve.kernels.torch_backend import TorchBackend

COMBINATIONS = [
    (backend, kind)
    for backend in (factory() for factory in BACKENDS.values())
    for kind in ("int8", "int4")
    if backend.missing(kind) is None
]
everywhere = pytest.mark.parametrize(
    ("backend", "kind"), COMBINATIONS, ids=[f"{backend.name}-{kind}" for backend, kind in COMBINATIONS]
)
ROWS = {
    "ordinary": lambda x: x,
    "all zero": lambda x: x * 0,
    "denormal": lambda x: x * 1e-41,
    "huge": lambda x: x * 1e30,
    "one huge outlier": lambda x: x.scatter(1, x.argmax(dim=1, keepdim=True), 1e8),
    "constant": lambda x: torch.full_like(x, 0.3),
    "one value": lambda x: torch.zeros_like(x).scatter(1, x.argmax(dim=1, keepdim=True), -2.5),
}


def noise(*dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(seed))


def levels_of(backend: Backend) -> int:
    """What the largest activation of a row becomes: FBGEMM has 8 bits for it on some CPUs and 7 on others."""
    return backend.activation_levels if isinstance(backend, TorchBackend) else EIGHT_BITS


def stacked(kind: Kind, num_experts: int, num_rows: int, num_cols: int, seed: int) -> PackedMatrix:
    packed = PackedMatrix.empty(kind, num_rows, num_cols, num_matrices=num_experts)
    for expert in range(num_experts):
        quantize_into(noise(num_rows, num_cols, seed=seed + expert) / num_cols**0.5, packed[expert])
    return packed


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    num_rows=st.integers(1, 70),
    num_cols=st.integers(1, 200),
    values=st.sampled_from(sorted(ROWS)),
    seed=st.integers(0, 1000),
)
@everywhere
def test_products_are_the_references_up_to_rounding(
    backend: Backend, kind: Kind, rows: int, num_rows: int, num_cols: int, values: str, seed: int
) -> None:
    weight, levels = quantize_matrix(noise(num_rows, num_cols, seed=seed), kind), levels_of(backend)
    x = ROWS[values](noise(rows, num_cols, seed=seed + 1))
    # One activation that lies between two steps may go either way in a backend that divides in another order.
    step = x.abs().amax(dim=1, keepdim=True) / levels * dequantize(weight).abs().amax(dim=1)
    expected = ReferenceBackend(levels).linear(weight)(x)
    found = backend.linear(weight)(x)
    slack = step if backend.name == "torch" else 0.0
    magnitudes = x.abs() @ dequantize(weight).abs().t()
    assert found.dtype is torch.float32
    assert ((found - expected).abs() <= 2e-6 * magnitudes + slack + 1e-37).all()


@everywhere
def test_products_are_those_of_floating_point_up_to_the_activations_bits(backend: Backend, kind: Kind) -> None:
    weight = quantize_matrix(noise(300, 512), kind)
    x = noise(33, 512, seed=1)
    exact = x @ dequantize(weight).t()
    found = backend.linear(weight)(x)
    assert float((found - exact).norm() / exact.norm()) < 0.01 * EIGHT_BITS / levels_of(backend)


@everywhere
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_alone(backend: Backend, kind: Kind, value: float) -> None:
    weight = quantize_matrix(noise(40, 64), kind)
    x = noise(5, 64)
    clean = backend.linear(weight)(x)
    x[2, 7] = value
    found = backend.linear(weight)(x)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 30),
    num_experts=st.integers(1, 6),
    hidden=st.sampled_from([16, 24, 33, 64]),
    inner=st.sampled_from([16, 20, 40, 64]),
    seed=st.integers(0, 1000),
)
@everywhere
def test_experts_are_the_references_up_to_one_step_of_the_inner_activations(
    backend: Backend, kind: Kind, rows: int, num_experts: int, hidden: int, inner: int, seed: int
) -> None:
    w1, w3 = stacked(kind, num_experts, inner, hidden, seed), stacked(kind, num_experts, inner, hidden, seed + 50)
    w2 = stacked(kind, num_experts, hidden, inner, seed + 100)
    k = min(2, num_experts)
    weights, ids = noise(rows, num_experts, seed=seed + 1).softmax(dim=-1).topk(k, dim=-1)
    x = noise(rows, hidden, seed=seed + 2)
    levels = levels_of(backend)
    expected = ReferenceBackend(levels).experts(w1, w2, w3)(x, ids, weights)
    found = backend.experts(w1, w2, w3)(x, ids, weights)
    assert found.shape == (rows, hidden)
    # Rounding may move an inner activation to the next of its steps; a few of them may.
    scale = expected.abs().amax(dim=1, keepdim=True).clamp_min(0.05)
    assert ((found - expected).abs() <= 0.05 * EIGHT_BITS / levels * scale).all()
    assert float((found - expected).norm()) <= 0.01 * EIGHT_BITS / levels * float(expected.norm()) + 1e-6


@everywhere
def test_no_row_is_dropped_when_all_choose_the_same_expert(backend: Backend, kind: Kind) -> None:
    w1, w3, w2 = stacked(kind, 4, 32, 48, 1), stacked(kind, 4, 32, 48, 9), stacked(kind, 4, 48, 32, 17)
    run = backend.experts(w1, w2, w3)
    x = noise(200, 48)
    ids, weights = torch.tensor([[2, 1]]).expand(200, 2).contiguous(), torch.tensor([[0.75, 0.25]]).repeat(200, 1)
    together = run(x, ids, weights)
    assert together.abs().amax(dim=1).gt(0).all()
    for row in (0, 100, 199):
        one = slice(row, row + 1)
        assert torch.allclose(run(x[one], ids[one], weights[one]), together[one], atol=1e-5)


@everywhere
def test_the_weight_of_an_expert_and_its_order_are_respected(backend: Backend, kind: Kind) -> None:
    w1, w3, w2 = stacked(kind, 3, 32, 48, 1), stacked(kind, 3, 32, 48, 9), stacked(kind, 3, 48, 32, 17)
    run = backend.experts(w1, w2, w3)
    x = noise(3, 48)
    one = run(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    other = run(x, torch.full((3, 1), 2), torch.ones(3, 1))
    both = run(x, torch.tensor([[2, 0]]).repeat(3, 1), torch.tensor([[0.25, 0.75]]).repeat(3, 1))
    assert torch.allclose(both, 0.75 * one + 0.25 * other, atol=1e-6)


@pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")
def test_the_torch_backend_loses_nothing_where_activations_and_weights_are_largest() -> None:
    weight = quantize_matrix(torch.ones(32, 1024), "int8")
    found = TorchBackend().linear(weight)(torch.ones(3, 1024))
    assert torch.allclose(found, torch.full((3, 32), 1024.0), rtol=1e-6)


@pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")
def test_quantised_tensor_types_leave_no_warning_and_no_engine_behind() -> None:
    before = torch.backends.quantized.engine
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TorchBackend().linear(quantize_matrix(noise(20, 40), "int8"))(noise(2, 40))
    assert not caught
    assert torch.backends.quantized.engine == before


@pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")
def test_the_torch_backend_tells_the_operator_when_activations_have_fewer_bits() -> None:
    backend = TorchBackend()
    assert backend.label == {127: "torch", 63: "torch (activations of 7 bits)"}[backend.activation_levels]


def test_activations_are_quantised_row_by_row_and_half_to_even() -> None:
    x = torch.tensor(
        [[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1e-45, 0.0, 0.0, 0.0], [torch.nan, 1.0, 2.0, 3.0]]
    )
    values, scales = quantize_rows(x)
    assert values.tolist()[:3] == [[127, 0, 2, -2], [0] * 4, [0] * 4]
    assert scales.flatten().tolist()[:3] == [1.0, 0.0, 0.0]
    assert bool(scales[3].isnan())
