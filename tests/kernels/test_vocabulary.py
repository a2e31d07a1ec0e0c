"""Passes over wide rows: right, and the same bits on every instruction set, in any batch and on any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixtral_serve.kernels.native_vocabulary  # noqa: F401 - registers the operators
from mixtral_serve.kernels import native
from mixtral_serve.kernels.native import Isa, limited_to

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")

ops = torch.ops.mixtral_serve
ISAS = [isa for isa in Isa if native.is_available() and isa <= native.best_isa()]
widths = st.sampled_from([1, 2, 15, 16, 17, 31, 64, 100, 255, 256, 257, 1000, 1536])
lengths = st.sampled_from([1, 8, 16, 20, 64, 256, 2000])


def random_rows(num_rows: int, width: int, seed: int) -> torch.Tensor:
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 10
    if seed % 2:
        rows[:, :: seed % 5 + 2] = float("-inf")  # as masks leave it
    return rows


def padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    missing = -rows.shape[1] % length
    return torch.nn.functional.pad(rows, (0, missing), value=float("-inf")).view(rows.shape[0], -1, length)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), widths, lengths, st.integers(0, 1000), st.floats(0.01, 100.0))
def test_chunks_are_right_and_rows_keep_their_bits(num_rows: int, width: int, length: int, seed: int, scale: float):
    rows = random_rows(num_rows, width, seed)
    chunks = padded(rows, length)
    maxima = ops.chunk_maxima(rows, length)
    assert torch.equal(maxima, chunks.amax(dim=-1))
    peaks = torch.where(rows.amax(dim=-1).isfinite(), rows.amax(dim=-1), torch.zeros(num_rows))
    scales = torch.full((num_rows,), scale)
    shares = ops.chunk_shares(rows, peaks, scales, length)
    exact = ((chunks - peaks.view(-1, 1, 1)).double() * scales.double().view(-1, 1, 1)).exp().sum(dim=-1)
    assert torch.allclose(shares.double(), exact, rtol=2e-5, atol=1e-6)
    for isa in ISAS:
        with limited_to(isa):
            for row in range(num_rows):
                one = slice(row, row + 1)
                assert torch.equal(ops.chunk_maxima(rows[one], length), maxima[one])
                assert torch.equal(ops.chunk_shares(rows[one], peaks[one], scales[one], length), shares[one])


def test_threads_change_no_bit() -> None:
    rows = random_rows(64, 8000, seed=2)
    peaks, scales = rows.amax(dim=-1), torch.linspace(0.1, 3, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((ops.chunk_maxima(rows, 256), ops.chunk_shares(rows, peaks, scales, 256)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 16, 37, 1536])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_finite_unless_one_of_its_numbers_is_not(isa: Isa, width: int, bad: float) -> None:
    rows = torch.full((width + 1, width), 3e38)
    rows[torch.arange(width), torch.arange(width)] = bad
    with limited_to(isa):
        assert ops.finite_rows(rows).tolist() == [False] * width + [True]


def test_a_tiny_temperature_leaves_the_peak_alone() -> None:
    rows = torch.tensor([[1.0, 5.0, 4.999, float("-inf")]])
    shares = ops.chunk_shares(rows, torch.tensor([5.0]), torch.tensor([1e30]), 1)
    assert shares.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_bad_arguments_are_refused() -> None:
    rows = torch.zeros(2, 8)
    for bad in (rows.double(), rows[:, ::2], rows[0], torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="rows must be dense fp32"):
            ops.chunk_maxima(bad, 4)
        with pytest.raises(ValueError, match="rows must be dense fp32"):
            ops.finite_rows(bad)
    with pytest.raises(ValueError, match="positive length"):
        ops.chunk_maxima(rows, 0)
    with pytest.raises(ValueError, match="peaks must be dense"):
        ops.chunk_shares(rows, torch.zeros(3), torch.ones(2), 4)
    with pytest.raises(ValueError, match="scales must be dense"):
        ops.chunk_shares(rows, torch.zeros(2), torch.ones(2, dtype=torch.float64), 4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("chunk_maxima", (torch.randn(3, 40), 16)),
        ("chunk_shares", (torch.randn(3, 40), torch.full((3,), 9.0), torch.ones(3), 16)),
        ("finite_rows", (torch.randn(3, 40),)),
    ],
)
def test_they_are_proper_operators(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)
