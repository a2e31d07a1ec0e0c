"""The largest logits of a row, against PyTorch's own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.model.likeliest import largest, top

# Few distinct values make ties common; widths around the chunk lengths are where a chunked search goes wrong.
WIDTHS = st.sampled_from([1, 2, 7, 8, 63, 64, 65, 255, 256, 257, 511, 1536, 4999, 32000])


def rows_of(seed: int, num_rows: int, width: int, *, tied: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, width, generator=generator)
    return (values * 2).round() if tied else values


@given(st.integers(0, 2**32), st.integers(1, 5), WIDTHS, st.booleans())
def test_largest_is_the_lowest_column_of_the_maximum(seed: int, num_rows: int, width: int, tied: bool) -> None:
    logits = rows_of(seed, num_rows, width, tied=tied)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert largest(logits).tolist() == expected


@given(st.integers(0, 2**32), st.integers(1, 5), WIDTHS, st.booleans(), st.data())
def test_top_finds_the_values_that_a_full_sort_finds(
    seed: int, num_rows: int, width: int, tied: bool, data: st.DataObject
) -> None:
    logits = rows_of(seed, num_rows, width, tied=tied)
    k = data.draw(st.integers(1, min(width, 200)))
    values, columns = top(logits, k)
    assert torch.equal(values, logits.sort(dim=-1, descending=True).values[:, :k])
    assert torch.equal(logits.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_rows_that_are_mostly_minus_infinity_keep_what_is_not() -> None:
    logits = torch.full((2, 1000), float("-inf"))
    logits[0, [999, 3]] = torch.tensor([2.0, 1.0])
    logits[1, 500] = -5.0
    assert largest(logits).tolist() == [999, 500]
    values, columns = top(logits, 64)
    assert columns[0, :2].tolist() == [999, 3]
    assert columns[1, 0].item() == 500
    assert bool(values[0, 2:].isinf().all())


def test_the_arguments_are_left_alone() -> None:
    logits = rows_of(1, 3, 1000, tied=False)
    before = logits.clone()
    largest(logits)
    top(logits, 10)
    assert torch.equal(logits, before)
