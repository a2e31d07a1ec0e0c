"""What an instruction set must compute as portable C++ does before it is trusted: ``all_trials``.

Owns the computations of the power-on self-test (``self_test`` runs them). They are small, random with fixed seeds, and
chosen to lead through what an instruction set has code of its own for: tiles, groups and sections of columns that are
whole and that are not; every number of rows that is computed at once; every byte as a weight and as a multiplier; rows
of zeros, with an outlier, and so small that their inverse is not finite; exponentials of all sizes; attention by slice
and by split, over every kind of storage, in place and from a copy. Of what chooses a token, the token counts.

Invariant: a trial starts from the same numbers whenever it is called, and gives finite ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, get_args

import torch

from mixtral_serve.kernels import (  # noqa: F401 - for the operators that they define
    native_choice,
    native_rowwise,
    native_vocabulary,
)
from mixtral_serve.kernels.formats import Kind, PackedMatrix
from mixtral_serve.kernels.native_attention import (
    MAX_PIECE_ROWS,
    MERGE_FIELDS,
    SPLIT_KEYS,
    partial_floats,
    workspace_floats,
)
from mixtral_serve.kernels.native_products import NativeExperts, NativeLinear
from mixtral_serve.kernels.quantizer import quantize_matrix

_ops: Final = torch.ops.mixtral_serve

_SECTION_COLS: Final = 4096
_NUM_ROWS: Final = (*range(1, 34), 48, 49, 64, 65, 300)
"""Of blocks of all sizes, which have at most 32, and of several of them."""


class Trial(NamedTuple):
    """A computation of which all instruction sets must make the same bits."""

    kernel: str
    """For the operator: what computed."""
    compute: Callable[[], Sequence[torch.Tensor]]


def all_trials() -> Iterator[Trial]:
    """Each kernel's, one after the other: they are not all in memory at once."""
    for kind in get_args(Kind):
        yield _linear(kind, num_outputs=40, num_cols=330, num_rows=_NUM_ROWS)
        yield _linear(kind, num_outputs=20, num_cols=_SECTION_COLS + 17 * 32 + 5, num_rows=(1, 12, 13, 40))
        yield _linear(kind, num_outputs=20, num_cols=20, num_rows=(1, 2, 20))
        yield _experts(kind)
        yield _quantize(kind)
    for width in (100, 512):
        yield _norm(width)
        yield _route(width)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        # Where both sizes are multiples of 16, few rows are multiplied with keys and values where these lie.
        for head_dim, block_size in ((112, 16), (40, 16), (64, 20)):
            yield _attention(dtype, head_dim, block_size)
    yield from _vocabulary()


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(num_rows: int, width: int) -> torch.Tensor:
    """Normal numbers; a row of zeros, one with an outlier, a tiny one and one of large neighbours among them."""
    rows = torch.randn(num_rows, width, generator=_generator())
    rows[3::11] = 0.0
    rows[4::11, width // 2] = 1e30
    rows[5::11] *= 1e-40
    rows[6::11] = 1.0
    return rows


def _packed(kind: Kind, num_rows: int, num_cols: int, *, num_matrices: int | None = None) -> PackedMatrix:
    """Any bytes, those included that no quantiser writes."""
    matrix = PackedMatrix.empty(kind, num_rows, num_cols, num_matrices=num_matrices)
    matrix.fill_scales(0.01)
    matrix.quants.random_(0, 256, generator=_generator(num_cols))
    if kind == "int4":
        for section in matrix.sections():
            section.multipliers.random_(-128, 128, generator=_generator(num_rows))
    return matrix


def _linear(kind: Kind, *, num_outputs: int, num_cols: int, num_rows: Sequence[int]) -> Trial:
    weight, x = _packed(kind, num_outputs, num_cols), _rows(max(num_rows), num_cols)
    multiply = NativeLinear(kind, weight.quants, weight.scales, num_rows=num_outputs, num_cols=num_cols)
    return Trial(f"linear_{kind}", lambda: [multiply(x[:count]) for count in num_rows])


def _experts(kind: Kind) -> Trial:
    width, inner, num_experts = 100, 48, 8
    matrices = (_packed(kind, *dims, num_matrices=num_experts) for dims in ((inner, width), (width, inner)))
    up, down = ((matrix.quants, matrix.scales) for matrix in matrices)
    compute = NativeExperts(kind, (*up, *down, *up), hidden_size=width)
    hidden = torch.randn(300, width, generator=_generator())
    hidden[::5] *= 100.0  # where an exponential is no longer finite, or nothing
    scores = torch.randn(300, num_experts, generator=_generator(1))
    weights, ids = scores.softmax(dim=1).topk(2, dim=1)
    one_pair = torch.tensor([5, 2]).repeat(300, 1)  # every row meets the same two

    def run() -> list[torch.Tensor]:
        counts = (1, 2, 13, 60, 300)
        found = [compute(hidden[:count], ids[:count], weights[:count]) for count in counts]
        return [*found, *(compute(hidden[:count], one_pair[:count], weights[:count]) for count in (20, 48))]

    return Trial(f"experts_{kind}", run)


def _quantize(kind: Kind) -> Trial:
    dense, wide = _rows(40, 330), _rows(8, _SECTION_COLS + 40)

    def run() -> list[torch.Tensor]:
        found = [quantize_matrix(weight, kind) for weight in (dense, dense.bfloat16(), wide)]
        return [tensor for packed in found for tensor in (packed.quants, packed.scales)]

    return Trial(f"quantize_{kind}", run)


def _norm(width: int) -> Trial:
    x, weight = _rows(20, width), torch.randn(width, generator=_generator(1))
    return Trial("rms_norm", lambda: [_ops.rms_norm(x, weight, 1e-5)])


def _route(width: int) -> Trial:
    hidden, gate = torch.randn(20, width, generator=_generator()), torch.randn(9, width, generator=_generator(1))
    gate[8] = gate[2]  # equals: the lesser number goes first
    return Trial("route", lambda: _ops.route(hidden, gate, 2))


def _attention(dtype: torch.dtype, head_dim: int, block_size: int) -> Trial:
    """A slice of 33 tokens after 40 of one request, and one token of another after 530, whole and in two splits."""
    num_query_heads, num_kv_heads = 8, 2
    group = num_query_heads // num_kv_heads
    start, num_tokens, decoded = 40, 33, 530
    blocks, num_blocks = -(-(start + num_tokens) // block_size), decoded // block_size + 1
    tables = torch.randperm(blocks + num_blocks, generator=_generator())
    positions = [*range(start, start + num_tokens), blocks * block_size + decoded]
    slots = torch.tensor([int(tables[at // block_size]) * block_size + at % block_size for at in positions])
    decode, num_splits = (num_tokens, decoded, blocks, 0, group), decoded // SPLIT_KEYS + 1
    by_few = [*_pieces(start, num_tokens * group, range(1, MAX_PIECE_ROWS)), (*decode, -1, -1)]
    by_many = [*_pieces(start, num_tokens * group, itertools.repeat(MAX_PIECE_ROWS)), (*decode, -1, -1)]
    split = [(*decode, index, index) for index in range(num_splits)]
    storage = _storage(dtype, (len(tables), num_kv_heads, head_dim, block_size))
    rows = [
        torch.randn(num_tokens + 1, heads, head_dim, generator=_generator(seed))
        for seed, heads in enumerate((num_query_heads, num_kv_heads, num_kv_heads))
    ]
    rows[0][::4] *= 40.0  # where all but a few weights are nothing
    workspace = [
        torch.empty(torch.get_num_threads() * workspace_floats(head_dim)),
        torch.empty(num_splits * partial_floats(head_dim, num_query_heads)),
    ]

    def attend(pieces: Sequence[Sequence[int]], merges: Sequence[int] = (), window: int = 0) -> list[torch.Tensor]:
        held = [tensor.clone() for tensor in storage]  # the step writes to it
        step = [slots, tables, torch.tensor(pieces), torch.tensor(merges, dtype=torch.int64).view(-1, MERGE_FIELDS)]
        return [_ops.paged_attention(rows, held, step, workspace, window, head_dim**-0.5), *held]

    def run() -> list[torch.Tensor]:
        of_splits = attend(split, (num_tokens, 0, num_splits))[0][-1]
        return [*attend(by_few), attend(by_many, window=50)[0], of_splits]

    return Trial("paged_attention", run)


def _pieces(start: int, num_rows: int, sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """The first slice of a step, whose tokens begin at ``start``, in pieces of these sizes (``native_attention``)."""
    first = 0
    for size in sizes:
        if first == num_rows:
            return
        taken = min(size, num_rows - first)
        yield 0, start, 0, first, taken, -1, -1
        first += taken


def _storage(dtype: torch.dtype, dims: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Keys and values of all blocks, and the scales of both for int8."""
    blocks, heads, head_dim, block_size = dims
    shapes = dims, (blocks, heads, block_size, head_dim)
    numbers = [torch.randn(shape, generator=_generator(2)) for shape in shapes]
    if dtype is not torch.int8:
        return [tensor.to(dtype) for tensor in numbers]
    scales = [torch.rand(blocks, heads, block_size, generator=_generator(3)) / 32 for _ in shapes]
    return [*((tensor * 32).clamp(-127, 127).to(dtype) for tensor in numbers), *scales]


def _vocabulary() -> Iterator[Trial]:
    asked = _asked()
    logits = torch.randn(len(asked), 5020, generator=_generator()) * 3
    masked, broken = logits.clone(), logits.clone()
    masked[:, ::7] = -torch.inf
    for row, (column, bad) in enumerate(itertools.product((0, 17, 40, 60, 5000, 5019), (torch.nan, -torch.inf))):
        broken[row, column] = bad
    yield Trial("chunk_maxima", lambda: [_ops.chunk_maxima(logits, length) for length in (7, 64, 100)])
    yield Trial("finite_rows", lambda: [_ops.finite_rows(broken)])
    yield Trial(
        "choose_tokens", lambda: [_ops.choose_tokens(broken, asked, True), _ops.choose_tokens(masked, asked, False)]
    )


def _asked() -> torch.Tensor:
    """What 64 rows ask for: every combination of some values; the columns are ``native_choice``'s."""
    values = (0.0, 0.3, 1.0, 2.5), (0.0, 40.0), (1.0, 0.9), (0.0, 0.05), (0.2, 0.8)
    return torch.cartesian_prod(*(torch.tensor(column, dtype=torch.float64) for column in values))
