"""Both ways of choosing a token do what the filters' definitions say, and the compiled one keeps a row's bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.kernels import native
from mixtral_serve.kernels.native import Isa, best_isa, limited_to
from mixtral_serve.kernels.native_choice import NOT_FINITE
from mixtral_serve.model.choice import choose_natively, choose_with_operators
from mixtral_serve.model.draws import Asked
from tests.model.filtering import draw_filtered
from tests.model.rejection import CHUNK, draw_by_rejection, fraction, split_mix

Choose: TypeAlias = Callable[..., list[int | None]]

has_native = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
WAYS = [pytest.param(choose_natively, marks=has_native, id="native"), pytest.param(choose_with_operators, id="torch")]

asked = st.builds(
    Asked,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 64, 700, 100_000]),
    top_p=st.sampled_from([1.0, 0.977, 0.503, 0.031]),
    min_p=st.sampled_from([0.0, 0.013, 0.7]),
    draw=st.floats(0, 1, exclude_max=True),
)


def logits_of(num_rows: int, width: int, seed: int, *, scale: float = 3.0, num_forbidden: int = 0) -> torch.Tensor:
    """Random rows in which some tokens, but not all, are forbidden."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, width, generator=generator) * scale
    for row in logits:
        row[torch.randperm(width, generator=generator)[: min(num_forbidden, width - 1)]] = -torch.inf
    return logits


def filters(params: Asked, width: int) -> bool:
    return 0 < params.top_k < width or params.top_p < 1 or params.min_p > 0


def check(choose: Choose, logits: torch.Tensor, rows: Sequence[Asked]) -> None:
    """Every token is the one that the definitions give, unless fp32 cannot tell it from another."""
    found = choose(logits, rows, is_raw=False)
    for row, params, token in zip(logits, rows, found, strict=True):
        assert token is not None
        if filters(params, len(row)):
            assert token == draw_filtered(row.tolist(), params), params
        else:
            drawn = draw_by_rejection(row.tolist(), params.temperature, params.draw)
            assert token == drawn.token or drawn.margin < 1e-5, params
        assert row[token] > -torch.inf


@pytest.mark.parametrize("choose", WAYS)
@given(
    rows=st.lists(asked, min_size=1, max_size=5),
    width=st.integers(1, 1500),
    seed=st.integers(0, 2**32),
    num_forbidden=st.sampled_from([0, 3, 1490]),
)
def test_a_token_is_the_one_that_the_definitions_give(
    choose: Choose, rows: list[Asked], width: int, seed: int, num_forbidden: int
) -> None:
    check(choose, logits_of(len(rows), width, seed, num_forbidden=num_forbidden), rows)


@pytest.mark.parametrize("choose", WAYS)
@given(
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    width=st.integers(1, 1500),
    seed=st.integers(0, 2**32),
    num_forbidden=st.sampled_from([0, 3, 1490]),
)
def test_a_token_drawn_from_all_is_the_one_that_the_definition_gives(
    choose: Choose, draws: list[float], temperature: float, width: int, seed: int, num_forbidden: int
) -> None:
    rows = [Asked(temperature, 0, 1.0, 0.0, draw) for draw in draws]
    check(choose, logits_of(len(rows), width, seed, num_forbidden=num_forbidden), rows)


@pytest.mark.parametrize("choose", WAYS)
def test_the_one_token_of_a_chunk_is_found_however_many_trials_it_takes(choose: Choose) -> None:
    logits = torch.full((200, 3 * CHUNK), -torch.inf)
    logits[:, CHUNK + 7] = 2.0
    rows = [Asked(1.0, 0, 1.0, 0.0, n / 200) for n in range(200)]
    assert sum(1 for row in rows if num_trials(row.draw, 7) > CHUNK) > 20, "one in e"
    assert choose(logits, rows, is_raw=False) == [CHUNK + 7] * 200


def num_trials(draw: float, place: int) -> int:
    """Trials until a place is proposed, where only one chunk has a weight."""
    words = split_mix(int(draw * 2**53))
    return next(n for n in itertools.count(1) if next(itertools.islice(words, 1, None)) >> 58 == place)


@pytest.mark.parametrize("choose", WAYS)
def test_every_token_of_all_is_drawn_as_often_as_it_weighs(choose: Choose) -> None:
    logits = logits_of(1, 150, seed=3, scale=1.0, num_forbidden=20)
    expected = (logits[0].double() / 0.8).softmax(dim=-1)
    num = 30_000
    draws = torch.rand(num, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()
    rows = [Asked(0.8, 0, 1.0, 0.0, draw) for draw in draws]
    counts = torch.bincount(torch.tensor(choose(logits.expand(num, -1), rows, is_raw=False)), minlength=150)
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0
    chi_square = float((((counts - num * expected) ** 2) / (num * expected))[possible].sum())
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("choose", WAYS)
@pytest.mark.parametrize(
    ("params", "scale"),
    [
        (Asked(1.0, 0, 0.9, 0.0, 0.77), 0.1),  # a nucleus of most of the vocabulary
        (Asked(1.0, 2500, 1.0, 0.0, 0.77), 1.0),  # more than are ranked
        (Asked(1.0, 2500, 0.9, 0.0, 0.77), 1.0),
        (Asked(1.0, 0, 0.9, 0.4, 0.77), 0.3),
        (Asked(1.0, 300, 0.9, 0.0, 0.77), 1.0),  # more than there are chunks
        (Asked(1.0, 900, 1.0, 0.0, 0.77), 1.0),  # more than are ranked by counting
        (Asked(0.5, 0, 0.6, 0.0, 0.3), 0.0),  # all are equal, and more than there is room for
        (Asked(0.5, 2500, 0.6001, 0.0, 0.3), 0.0),
        (Asked(0.5, 0, 0.5, 0.0, 0.5), 0.0),  # nothing here is rounded
        (Asked(0.5, 0, 0.5, 0.0, 0.9999), 0.0),
        (Asked(0.5, 40, 1.0, 0.0, 0.99), 0.0),
        (Asked(1.0, 0, 1.0, 0.4, 0.5), 0.0),
        (Asked(1.0, 0, 1.0, 1.0, 0.5), 0.0),
    ],
)
def test_rows_that_the_likely_few_do_not_settle_are_settled_all_the_same(
    choose: Choose, params: Asked, scale: float
) -> None:
    check(choose, logits_of(3, 9000, seed=1, scale=scale), [params] * 3)


@pytest.mark.parametrize("choose", WAYS)
@pytest.mark.parametrize("top_k", [40, 300, 700, 2500])
def test_of_equals_at_the_cut_the_lowest_ids_stay(choose: Choose, top_k: int) -> None:
    logits = (logits_of(1, 9000, seed=4, scale=1.0) * 4).round() / 4
    by_likelihood = logits[0].sort(descending=True, stable=True)
    assert by_likelihood.values[top_k - 1] == by_likelihood.values[top_k], "the cut is among equals"
    highest_draw = 1 - 2**-53  # draws the highest of the ids that stay
    tokens = choose(logits, [Asked(1.0, top_k, 1.0, 0.0, highest_draw)], is_raw=False)
    assert tokens == [int(by_likelihood.indices[:top_k].max())]


@has_native
def test_where_no_token_is_likely_enough_the_most_likely_one_stays() -> None:
    logits = torch.zeros(1, 9000)
    logits[0, :100] = -1.0
    table = torch.tensor([[1.0, 0, 1.0, 1.5, 0.5]], dtype=torch.float64)
    assert torch.ops.mixtral_serve.choose_tokens(logits, table, False).tolist() == [100]


@pytest.mark.parametrize("choose", WAYS)
def test_a_likely_token_behind_thousands_of_equals_is_not_overlooked(choose: Choose) -> None:
    logits = torch.zeros(1, 9000)
    logits[0, -1] = 9.0
    check(choose, logits, [Asked(1.0, 40, 1.0, 0.0, 0.9)])


@has_native
@pytest.mark.parametrize("width", [1, 37, 64, 130])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_kernel_finds_a_number_that_is_not_finite_wherever_it_is(width: int, bad: float) -> None:
    logits = torch.full((width + 1, width), 3e38)
    logits[torch.arange(width), torch.arange(width)] = bad
    table = torch.tensor([[0.0, 0, 1, 0, 0]] * (width + 1), dtype=torch.float64)
    for isa in [isa for isa in Isa if isa <= best_isa()]:
        with limited_to(isa):
            tokens = torch.ops.mixtral_serve.choose_tokens(logits, table, True).tolist()
        assert tokens == [NOT_FINITE] * width + [0]


@pytest.mark.parametrize("choose", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_raw_row_that_is_not_finite_has_no_token_and_disturbs_none(choose: Choose, bad: float) -> None:
    logits = logits_of(5, 300, seed=2)
    rows = [Asked(0, 0, 1, 0, 0), Asked(1, 0, 1, 0, 0.4), Asked(1, 20, 0.9, 0, 0.4), *[Asked(0, 0, 1, 0, 0)] * 2]
    alone = choose(logits, rows, is_raw=True)
    logits[4, 123] = bad
    assert choose(logits, rows, is_raw=True) == [*alone[:4], None]


@pytest.mark.parametrize("choose", WAYS)
@given(seed=st.integers(0, 2**32), width=st.integers(1, 700))
def test_greedy_takes_the_lowest_id_among_the_largest(choose: Choose, seed: int, width: int) -> None:
    logits = logits_of(4, width, seed).round()
    assert choose(logits, [Asked(0, 3, 0.5, 0.1, 0.9)] * 4, is_raw=True) == [
        row.index(max(row)) for row in logits.tolist()
    ]


FILTERS = [
    Asked(1.0, 0, 0.9, 0.0, 0.7),
    Asked(1.0, 0, 1.0, 0.01, 0.7),
    Asked(1.0, 40, 1.0, 0.0, 0.7),
    Asked(1.0, 40, 0.9, 0.01, 0.7),
]


@pytest.mark.parametrize("choose", WAYS)
@pytest.mark.parametrize("num_allowed", [1, 5, 63, 500, 4000])
@pytest.mark.parametrize("width", [4100, 32_000])
def test_where_a_mask_leaves_few_tokens_one_of_them_is_drawn(choose: Choose, num_allowed: int, width: int) -> None:
    check(choose, logits_of(len(FILTERS), width, seed=6, num_forbidden=width - num_allowed), FILTERS)


def test_the_words_of_a_draw_are_those_of_split_mix() -> None:
    # As published for the state 1234567, at https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert list(itertools.islice(split_mix(1234567), 5)) == wanted


@has_native
def test_the_bounds_behind_a_draw_are_the_same_on_every_instruction_set() -> None:
    """Between two neighbouring numbers another chunk is proposed; a bound some bits off would move the place."""
    num_chunks = 38  # in vectors of 16 and 8, and some over
    others = torch.arange(1, num_chunks)
    firsts = ((n / 1000, fraction(next(split_mix(int(n / 1000 * 2**53))))) for n in range(1000))
    draws = [draw for draw, first in firsts if 0.55 < first < 0.95][: len(others)]
    temperatures = torch.linspace(0.5, 1.5, len(others), dtype=torch.float64)

    def is_proposed(levels: torch.Tensor, rows: slice = slice(None)) -> list[bool]:
        """Whether each row draws from the one other chunk with a weight, at that level; each proposal is accepted."""
        logits = torch.full((len(others), num_chunks, CHUNK), -torch.inf)
        logits[:, 0] = 0.0
        logits[torch.arange(len(others)), others] = levels.unsqueeze(1)
        table = torch.tensor([[0, 0, 1, 0, draw] for draw in draws], dtype=torch.float64)
        table[:, 0] = temperatures
        tokens = torch.ops.mixtral_serve.choose_tokens(logits.flatten(1)[rows].contiguous(), table[rows], False)
        chunks = tokens // CHUNK
        assert bool(((chunks == 0) | (chunks == others[rows])).all())
        return (chunks > 0).tolist()

    low, high = torch.full((len(others),), -8.0), torch.zeros(len(others))
    for _ in range(64):
        levels = low + (high - low) / 2
        found = torch.tensor(is_proposed(levels))
        low, high = torch.where(found, low, levels), torch.where(found, levels, high)
    low = torch.nextafter(high, torch.tensor(-torch.inf))
    for isa in [isa for isa in Isa if isa <= best_isa()]:
        with limited_to(isa):
            assert is_proposed(low) == [False] * len(others)
            assert is_proposed(high) == [True] * len(others)
    alone = [is_proposed(levels, slice(i, i + 1)) for levels in (low, high) for i in range(len(others))]
    assert alone == [[False]] * len(others) + [[True]] * len(others)


@has_native
@pytest.mark.parametrize(("scale", "rank"), [(3.0, 5), (0.3, 3000)], ids=["narrow", "wide"])
def test_the_total_that_cuts_a_nucleus_keeps_every_bit(scale: float, rank: int) -> None:
    """Between two neighbouring numbers a nucleus takes one token more: a total some bits off would move the place."""
    num_rows = 24
    logits = logits_of(num_rows, 4001, seed=9, scale=scale).sort(dim=-1, descending=True).values
    reached = logits.double().softmax(dim=-1).cumsum(dim=-1)
    highest_draw = 1 - 2**-53  # draws the last token of those that are left, here the least likely one

    def num_kept(nuclei: torch.Tensor, rows: slice = slice(None)) -> list[int]:
        table = torch.zeros(num_rows, 5, dtype=torch.float64)
        table[:, 0], table[:, 2], table[:, 4] = 1.0, nuclei, highest_draw
        tokens = torch.ops.mixtral_serve.choose_tokens(logits[rows].contiguous(), table[rows].contiguous(), True)
        return (tokens + 1).tolist()

    low, high = reached[:, rank - 1] * (1 - 1e-6), reached[:, rank - 1] * (1 + 1e-6)
    for _ in range(64):
        nuclei = low + (high - low) / 2
        is_low = torch.tensor(num_kept(nuclei)) <= rank
        low, high = torch.where(is_low, nuclei, low), torch.where(is_low, high, nuclei)
    assert torch.allclose(low, reached[:, rank - 1], rtol=1e-12)
    high = torch.nextafter(low, torch.tensor(1.0, dtype=torch.float64))
    for isa in [isa for isa in Isa if isa <= best_isa()]:
        with limited_to(isa):
            assert num_kept(low) == [rank] * num_rows
            assert num_kept(high) == [rank + 1] * num_rows
    alone = [num_kept(nuclei, slice(i, i + 1)) for nuclei in (low, high) for i in range(num_rows)]
    assert alone == [[rank]] * num_rows + [[rank + 1]] * num_rows


@has_native
@given(rows=st.lists(asked, min_size=4, max_size=4), seed=st.integers(0, 2**32))
def test_neither_neighbours_nor_threads_nor_instructions_change_a_token(rows: list[Asked], seed: int) -> None:
    logits = logits_of(4, 40_000, seed)
    together = choose_natively(logits, rows, is_raw=True)
    assert [choose_natively(logits[i : i + 1], rows[i : i + 1], is_raw=True) for i in range(4)] == [
        [token] for token in together
    ]
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert choose_natively(logits, rows, is_raw=True) == together
    finally:
        torch.set_num_threads(num_threads)
    for isa in Isa:
        if isa < best_isa():
            with limited_to(isa):
                assert choose_natively(logits, rows, is_raw=True) == together


@has_native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stride", [1, 7, 700])
def test_numbers_that_nobody_should_pass_lead_nowhere_outside_the_row(bad: float, stride: int) -> None:
    logits = logits_of(6, 3000, seed=5)
    logits[:, ::stride] = bad
    rows = [(0, 0, 1, 0, 0), (1, 0, 1, 0, 0.99), (1, 40, 1, 0, 0.9), (1, 0, 0.9, 0, 0.5), (1, 900, 1, 0, 0.9)]
    table = torch.tensor([*rows, (1, 0, 1, 0.1, 0.9)], dtype=torch.float64)
    tokens = torch.ops.mixtral_serve.choose_tokens(logits, table, False).tolist()
    assert all(token == NOT_FINITE or 0 <= token < 3000 for token in tokens)
    if stride == 1:
        assert tokens == [NOT_FINITE] * 6


@has_native
@given(
    table=st.lists(
        st.tuples(*[st.sampled_from([0.0, 1.0, -1.0, 0.5, 1.5, 1e300, 1e-300, -torch.inf, torch.inf, torch.nan])] * 5),
        min_size=1,
        max_size=4,
    )
)
def test_parameters_that_nobody_should_pass_lead_nowhere_outside_the_row(table: list[tuple[float, ...]]) -> None:
    logits = logits_of(len(table), 100, seed=5)
    tokens = torch.ops.mixtral_serve.choose_tokens(logits, torch.tensor(table, dtype=torch.float64), True).tolist()
    assert all(0 <= token < 100 for token in tokens)


@pytest.mark.slow
@has_native
def test_it_is_a_proper_operator_and_refuses_what_it_cannot_read() -> None:
    choose_tokens = torch.ops.mixtral_serve.choose_tokens
    logits, table = torch.randn(3, 40), torch.tensor([[1.0, 2, 1, 0, 0.5]] * 3, dtype=torch.float64)
    torch.library.opcheck(choose_tokens.default, (logits, table, True))
    for bad in (logits.double(), logits[:, ::2], logits[0], torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="logits must be dense fp32"):
            choose_tokens(bad, table, True)
    for bad in (table.float(), table[:2], table[:, :4]):
        with pytest.raises(ValueError, match=r"asked must be dense fp64 \[3, 5\]"):
            choose_tokens(logits, bad, True)
