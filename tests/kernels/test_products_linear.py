"""``linear_int8`` and ``linear_int4``: close to a float64 product, and the same bits wherever a row is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_serve.kernels import native, native_products
from mixtral_serve.kernels.formats import Kind, PackedMatrix, dequantize, integers, quantize, row_scales
from mixtral_serve.kernels.native import Isa, limited_to
from mixtral_serve.kernels.native_products import KernelArgumentError, linear_scratch_bytes

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels were not built")

KINDS: tuple[Kind, ...] = ("int8", "int4")
ROUNDING = 2.0**-24


def isas() -> list[Isa]:
    return [isa for isa in Isa if isa <= native.best_isa()]


def linear(x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.mixtral_serve, f"linear_{weight.kind}")
    return operator(x, weight.quants, weight.scales, weight.num_rows)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers and scales of rows, as the kernels define them, in float64."""
    largest = x.abs().amax(dim=1, keepdim=True)
    inverse = torch.full_like(largest, 127.0) / largest  # 127 / largest would be rounded twice
    usable = torch.isfinite(inverse)
    return torch.where(usable, (x * inverse).round(), 0.0).double(), torch.where(usable, largest / 127, 0.0).double()


def reference(x: torch.Tensor, weight: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the largest error that the kernel's own roundings can make."""
    values, scales = quantized_rows(x)
    num_groups = row_scales(weight).shape[1]
    rows = integers(weight)[: weight.num_rows].double()
    padded = torch.nn.functional.pad(values, (0, rows.shape[1] - weight.num_cols))
    groups = rows.view(weight.num_rows, num_groups, -1)
    sums = torch.einsum("rgc,ogc->rog", padded.view(len(x), num_groups, -1), groups)  # exact
    terms = sums * row_scales(weight)[: weight.num_rows].double()
    product = terms.sum(dim=2) * scales
    return product, (num_groups + 3) * ROUNDING * terms.abs().sum(dim=2) * scales


def check_everywhere(x: torch.Tensor, weight: PackedMatrix) -> None:
    """Within the bound, with the same bits on every instruction set."""
    expected, bound = reference(x, weight)
    results = []
    for isa in isas():
        with limited_to(isa):
            results.append(linear(x, weight))
    assert bool(((results[0].double() - expected).abs() <= bound).all())
    assert all(torch.equal(results[0], result) for result in results[1:])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@given(
    num_rows=st.integers(1, 70),
    num_cols=st.integers(1, 260),
    rows=st.one_of(st.integers(1, 40), st.integers(1, 300)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_product_is_within_its_bound_of_float64_and_the_same_on_every_instruction_set(
    kind: Kind, num_rows: int, num_cols: int, rows: int, seed: int
) -> None:
    weight, x = quantize(randn(num_rows, num_cols, seed=seed), kind), randn(rows, num_cols, seed=seed + 1)
    check_everywhere(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@given(
    num_cols=st.one_of(st.integers(4000, 4200), st.integers(8100, 8300)),
    rows=st.integers(1, 80),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_wide_rows_of_several_sections_are_within_the_same_bound_on_every_instruction_set(
    kind: Kind, num_cols: int, rows: int, outliers: int, seed: int
) -> None:
    dense, x = randn(20, num_cols, seed=seed), randn(rows, num_cols, seed=seed + 1)
    for column in range(outliers):  # multipliers from 1 to 127, of both signs
        dense[:, column * 1301] *= 10.0 ** (column + 1)
    weight = quantize(dense, kind)
    check_everywhere(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 12, 13, 17, 33, 65, 256, 300])
@pytest.mark.parametrize("num_cols", [4096 + 3 * 32, 2 * 4096])
def test_bytes_that_no_quantiser_writes_are_multiplied_like_any_others(kind: Kind, rows: int, num_cols: int) -> None:
    """Every byte is a weight, and every byte a multiplier, -128 as well."""
    weight, x = PackedMatrix.empty(kind, 48, num_cols), randn(rows, num_cols, seed=1)
    generator = torch.Generator().manual_seed(rows)
    weight.fill_scales(1 / 128)
    weight.quants.random_(0, 256, generator=generator)
    if kind == "int4":
        for section in weight.sections():
            section.multipliers.random_(-128, 128, generator=generator)
    check_everywhere(x, weight)


@given(num_cols=st.integers(1, 300), rows=st.integers(1, 40), choices=st.integers(1, 10), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_neighbours_too_large_for_sixteen_bits_together_are_multiplied_like_any_others(
    num_cols: int, rows: int, choices: int, seed: int
) -> None:
    """AVX2 adds two products of bytes in 16 bits: 255 * 128 + 255 * 1 is too much. Columns may all be so."""
    generator = torch.Generator().manual_seed(seed)
    weight = PackedMatrix.empty("int8", 40, num_cols)
    weight.fill_scales(1 / 128)
    weight.quants.random_(0, 2, generator=generator).mul_(255)
    columns = torch.tensor([127.0, 64.0, 65.0, -127.0, -64.0, -65.0, 1.0, 2.0, -1.0, -2.0])
    x = columns[torch.randint(choices, (rows, num_cols), generator=generator)]
    x[:, 0] = 127.0  # so that columns are their own integers
    check_everywhere(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_cols", [330, 4096 + 17 * 32 + 5])
@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.name.lower())
def test_row_has_the_same_bits_alone_and_at_any_place_of_any_batch(kind: Kind, num_cols: int, isa: Isa) -> None:
    if isa not in isas():
        pytest.skip(f"this CPU has no {isa.name}")
    weight, x = quantize(randn(50, num_cols), kind), randn(40, num_cols, seed=1)
    with limited_to(isa):
        alone = torch.cat([linear(row.unsqueeze(0), weight) for row in x])
        for size in range(1, 41):
            assert torch.equal(linear(x[:size], weight), alone[:size])
            assert torch.equal(linear(x[40 - size :], weight), alone[40 - size :])


@pytest.mark.parametrize("kind", KINDS)
def test_result_has_the_same_bits_for_one_to_eight_threads(kind: Kind) -> None:
    weight, x = quantize(randn(700, 160), kind), randn(37, 160, seed=1)
    results = []
    for count in range(1, 9):
        with threads(count):
            results.append(linear(x, weight))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_one_pass_are_computed_like_the_others(kind: Kind) -> None:
    rows = native_products.PASS_ROWS + 5
    weight, x = quantize(randn(20, 64), kind), randn(rows, 64, seed=1)
    whole = linear(x, weight)
    assert torch.equal(whole[-5:], linear(x[-5:], weight))
    assert linear_scratch_bytes(kind, rows, 64) == linear_scratch_bytes(kind, native_products.PASS_ROWS, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_pytorchs_own_products_and_these_leave_each_other_alone(kind: Kind) -> None:
    """Both may use registers that keep a shape between instructions."""
    weight, x = quantize(randn(100, 330), kind), randn(40, 330, seed=1)
    left, right = randn(64, 330, seed=2).bfloat16(), randn(330, 96, seed=3).bfloat16()
    ours, theirs = linear(x, weight), left @ right
    for _ in range(3):
        assert torch.equal(left @ right, theirs)
        assert torch.equal(linear(x, weight), ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [13, 26, 35])
def test_adversarial_rows_are_right_and_touch_no_neighbour(kind: Kind, rows: int) -> None:
    weight, x = quantize(randn(40, 100), kind), randn(rows, 100, seed=1)
    plain = x.clone()
    x[0] = 0.0
    x[1, 7] = 1e30  # an outlier: all others round to zero
    x[2] = 1e-40  # 127 / 1e-40 is no finite number
    x[3] *= 1e-36
    x[4, 99] = float("nan")
    x[5, 0] = float("inf")
    x[6, 50:] = -float("inf")
    x[7] *= 2.0**100
    expected, bound = reference(x, weight)
    for isa in isas():
        with limited_to(isa):
            result, untouched = linear(x, weight), linear(plain, weight)
        assert bool((result[[0, 2]] == 0).all())
        assert bool(result[4:7].isnan().all())
        finite = [1, 3, 7]
        tiny = 2.0**-140  # near the smallest numbers a product is rounded to a multiple of 2^-149
        assert bool(((result[finite].double() - expected[finite]).abs() <= bound[finite] + tiny).all())
        assert torch.equal(result[8:], untouched[8:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 20, 27])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_sums_fit(kind: Kind, rows: int, sign: float) -> None:
    num_cols = native_products.MAX_COLS
    weight = quantize(torch.full((16, num_cols), sign), kind)
    x = torch.ones(rows, num_cols)
    expected = (dequantize(weight).double() @ x[0].double())[0].item()
    for isa in isas():
        with limited_to(isa):
            assert linear(x, weight)[-1, 0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind: Kind) -> None:
    assert linear(torch.empty(0, 64), quantize(randn(20, 64), kind)).shape == (0, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_keeps_pytorchs_rules(kind: Kind) -> None:
    weight, x = quantize(randn(20, 64), kind), randn(3, 64)
    arguments = (x, weight.quants, weight.scales, weight.num_rows)
    operator = getattr(torch.ops.mixtral_serve, f"linear_{kind}").default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_scales_between_two_numbers_in_memory_are_refused() -> None:
    weight = quantize(randn(20, 64), "int4")
    moved = torch.empty(weight.scales.numel() + 1, dtype=torch.uint8)[1:].view(weight.scales.shape)
    with pytest.raises(KernelArgumentError, match=r"^scales must begin at a multiple of 4 bytes"):
        torch.ops.mixtral_serve.linear_int4(randn(3, 64), weight.quants, moved, 20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.ones(3, 64, dtype=torch.float64)}, "x"),
        ({"x": torch.ones(3, 65)}, "quants"),
        ({"x": torch.ones(64)}, "x"),
        ({"x": torch.ones(3, 0)}, "x"),
        ({"x": torch.ones(3, native_products.MAX_COLS + 1)}, "x"),
        ({"x": torch.ones(64, 3).T}, "x"),
        ({"x": torch.ones(3, 128)[:, :64]}, "x"),
        ({"quants": torch.ones(2, 2, 256, dtype=torch.int8)}, "quants"),
        ({"quants": torch.ones(1, 2, 256, dtype=torch.uint8)}, "quants"),
        ({"scales": torch.ones(2, 16, dtype=torch.float16)}, "scales"),
        ({"scales": torch.ones(1)}, "scales"),
        ({"num_rows": 33}, "quants"),
        ({"num_rows": 0}, "num_rows"),
        ({"num_rows": -16}, "num_rows"),
    ],
)
def test_wrong_arguments_are_refused_by_name(kind: Kind, change: dict[str, object], named: str) -> None:
    weight = quantize(randn(20, 64), kind)
    arguments = {"x": randn(3, 64), "quants": weight.quants, "scales": weight.scales, "num_rows": 20} | change
    with pytest.raises(KernelArgumentError, match=rf"^{named} must"):
        getattr(torch.ops.mixtral_serve, f"linear_{kind}")(*arguments.values())
