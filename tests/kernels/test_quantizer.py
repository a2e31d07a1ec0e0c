"""The compiled quantiser gives the bits of its definition, and the definition is a good one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels import native
from mixtral_serve.kernels.formats import Kind, NotFiniteError, PackedMatrix, dequantize, integers, quantize, row_scales
from mixtral_serve.kernels.quantizer import quantize_into, quantize_matrix

needs_native = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
kinds = pytest.mark.parametrize("kind", ["int8", "int4"])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(left: PackedMatrix, right: PackedMatrix) -> bool:
    return torch.equal(left.quants, right.quants) and torch.equal(left.scales, right.scales)


def noise(num_rows: int, num_cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_cols, generator=torch.Generator().manual_seed(seed))


SHAPES_OF_VALUES = {
    "ordinary": lambda w: w,
    "tiny": lambda w: w * 1e-38,
    "denormal": lambda w: w * 1e-42,
    "huge": lambda w: (w * 1e37).clamp(-3e38, 3e38),
    "one outlier per row": lambda w: w.scatter(1, w.argmax(dim=1, keepdim=True), 1e6),
    "mostly zero": lambda w: torch.where(w > 1.5, w, 0.0),
    "ties of both signs": lambda w: w.sign() * 0.5,
    "whole numbers": lambda w: (w * 3).round(),
}


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    num_cols=st.integers(1, 200),
    seed=st.integers(0, 1000),
    values=st.sampled_from(sorted(SHAPES_OF_VALUES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["int8", "int4"]),
)
def test_the_compiled_quantiser_gives_the_bits_of_the_definition(num_rows, num_cols, seed, values, dtype, kind) -> None:
    weight = SHAPES_OF_VALUES[values](noise(num_rows, num_cols, seed)).to(dtype)
    weight = weight.nan_to_num(0.0, 0.0, 0.0)  # half precision does not reach the huge ones
    expected = quantize(weight, kind)
    for isa in native.Isa:
        with native.limited_to(isa):
            assert same(quantize_matrix(weight, kind), expected), isa


@needs_native
@pytest.mark.parametrize("values", sorted(SHAPES_OF_VALUES))
@pytest.mark.parametrize("num_cols", [4096, 4097, 8230])
def test_sections_have_the_bits_of_the_definition(values: str, num_cols: int) -> None:
    weight = SHAPES_OF_VALUES[values](noise(18, num_cols))
    for isa in native.Isa:
        with native.limited_to(isa):
            assert same(quantize_matrix(weight, "int4"), quantize(weight, "int4")), isa


@needs_native
@kinds
@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_the_bits_do_not_depend_on_the_number_of_threads(kind: Kind, num_threads: int) -> None:
    weight = noise(333, 96)
    torch.set_num_threads(num_threads)
    assert same(quantize_matrix(weight, kind), quantize(weight, kind))


@kinds
def test_a_view_is_quantised_like_its_copy(kind: Kind) -> None:
    base = noise(50, 300)
    for view in (base[3:40, 7:130], base.t(), base[::2]):
        assert same(quantize_matrix(view, kind), quantize_matrix(view.contiguous(), kind))


@kinds
def test_one_of_several_is_quantised_in_its_place(kind: Kind) -> None:
    several = PackedMatrix.empty(kind, 20, 40, num_matrices=3)
    weights = [noise(20, 40, seed) for seed in range(3)]
    for index, weight in enumerate(weights):
        quantize_into(weight, several[index])
    for index, weight in enumerate(weights):
        assert same(several[index], quantize(weight, kind))


@kinds
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused(kind: Kind, value: float, dtype: torch.dtype) -> None:
    weight = noise(40, 50).to(dtype)
    weight[37, 49] = value
    for function in (quantize, quantize_matrix):
        with pytest.raises(NotFiniteError, match="not finite"):
            function(weight, kind)


@kinds
def test_padding_is_zero(kind: Kind) -> None:
    packed = quantize_matrix(noise(17, 33), kind)
    values = integers(packed)
    assert values.shape == (32, 64)
    assert not values[17:].any()
    assert not values[:, 33:].any()
    assert not row_scales(packed)[17:].any()


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    weight = noise(64, 200) * torch.logspace(-6, 3, 64).unsqueeze(1)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((dequantize(quantize_matrix(weight, "int8")) - weight).abs() <= 0.5001 * step).all()


def test_int4_errs_less_than_the_best_plain_scale_does() -> None:
    """The plain way: the largest value of a group becomes -8, with a scale in full precision."""
    weight = noise(256, 512)
    groups = weight.view(256, -1, 32)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = largest / -8
    plain = ((groups / scales).round().clamp(-8, 7) * scales).view(256, 512)
    error = (dequantize(quantize_matrix(weight, "int4")) - weight).square().mean()
    assert error < 0.9 * (plain - weight).square().mean()
    assert error.sqrt() < 0.085 * weight.square().mean().sqrt()


def test_groups_that_are_small_beside_their_section_keep_their_values() -> None:
    """A group a hundredth as large as the largest still has a scale of its own, if a coarse one."""
    weight = noise(16, 4096)
    weight[:, :32] *= 100
    found = dequantize(quantize_matrix(weight, "int4"))
    error = (found - weight)[:, 32:].square().mean().sqrt() / weight[:, 32:].square().mean().sqrt()
    assert error < 0.25


@kinds
def test_quantising_what_was_dequantised_changes_little(kind: Kind) -> None:
    once = dequantize(quantize_matrix(noise(64, 96), kind))
    twice = dequantize(quantize_matrix(once, kind))
    step = once.view(64, -1, 32).abs().amax(dim=2, keepdim=True) / (127 if kind == "int8" else 7)
    assert ((twice - once).view(64, -1, 32).abs() <= step).all()
