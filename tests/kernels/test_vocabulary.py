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
@given(st.integers(1, 6), widths, lengths, st.integers(0, 1000))
def test_maxima_are_those_of_the_chunks_on_every_instruction_set(num_rows: int, width: int, length: int, seed: int):
    rows = random_rows(num_rows, width, seed)
    for isa in ISAS:
        with limited_to(isa):
            assert torch.equal(ops.chunk_maxima(rows, length), padded(rows, length).amax(dim=-1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 16, 37, 1536])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_finite_unless_one_of_its_numbers_is_not(isa: Isa, width: int, bad: float) -> None:
    rows = torch.full((width + 1, width), 3e38)
    rows[torch.arange(width), torch.arange(width)] = bad
    with limited_to(isa):
        assert ops.finite_rows(rows).tolist() == [False] * width + [True]


def test_bad_arguments_are_refused() -> None:
    rows = torch.zeros(2, 8)
    for bad in (rows.double(), rows[:, ::2], rows[0], torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="rows must be dense fp32"):
            ops.chunk_maxima(bad, 4)
        with pytest.raises(ValueError, match="rows must be dense fp32"):
            ops.finite_rows(bad)
    with pytest.raises(ValueError, match="positive length"):
        ops.chunk_maxima(rows, 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("chunk_maxima", (torch.randn(3, 40), 16)),
        ("finite_rows", (torch.randn(3, 40),)),
    ],
)
def test_they_are_proper_operators(name: str, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments)
