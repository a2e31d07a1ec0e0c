"""The attention operator refuses what does not fit, whatever the integers of a step say, and is a proper operator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from mixtral_serve.kernels import native
from mixtral_serve.kernels.native_attention import partial_floats, workspace_floats

if not native.is_available():  # the sizes of what is refused below are the kernels' own
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

WHOLE = [0, 4, 0, 0, 6, -1, -1]
"""Three tokens from position 4, two query heads to a key head: one piece of six rows."""


def integers(*rows: list[int], num_fields: int = 0) -> torch.Tensor:
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return flat.view(-1, num_fields) if num_fields else flat


@dataclass(frozen=True)
class Call:
    """Three tokens at positions 4 to 6 of one request in blocks of 4, in a storage of 5 blocks."""

    rows: list[torch.Tensor] = field(default_factory=lambda: [torch.randn(3, heads, 8) for heads in (4, 2, 2)])
    storage: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(5, 2, 8, 4), torch.zeros(5, 2, 4, 8)])
    slots: torch.Tensor = field(default_factory=lambda: integers([12, 13, 14]))
    tables: torch.Tensor = field(default_factory=lambda: integers([2, 3]))
    pieces: torch.Tensor = field(default_factory=lambda: integers(WHOLE, num_fields=7))
    merges: torch.Tensor = field(default_factory=lambda: integers(num_fields=3))
    workspace: list[torch.Tensor] = field(
        default_factory=lambda: [torch.zeros(workspace_floats(8)), torch.zeros(2 * partial_floats(8, 4))]
    )
    window: int = 0

    @property
    def arguments(self) -> tuple[object, ...]:
        step = [self.slots, self.tables, self.pieces, self.merges]
        return self.rows, self.storage, step, self.workspace, self.window, 0.35

    def __call__(self) -> torch.Tensor:
        return torch.ops.mixtral_serve.paged_attention(*self.arguments)


def test_the_call_that_the_others_spoil_is_right() -> None:
    call = Call()
    before = [torch.randn(4, 2, 8) for _ in range(2)]
    call.storage[0][2], call.storage[1][2] = before[0].permute(1, 2, 0), before[1].permute(1, 0, 2)
    keys, values = (torch.cat(pair) for pair in zip(before, call.rows[1:], strict=True))
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        call.rows[0].transpose(0, 1),
        *(t.repeat_interleave(2, 1).transpose(0, 1) for t in (keys, values)),
        mask,
        scale=0.35,
    )
    assert torch.allclose(call(), wanted.transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (0, -1),  # first row of the slice
        (0, 1),  # two tokens are left, not three
        (0, 1 << 62),
        (1, -1),  # start
        (1, 8),  # the table has no third block
        (1, 1 << 62),
        (2, -1),  # table
        (2, 1),
        (2, -(1 << 62)),
        (3, -1),  # first row of the piece
        (3, 1),
        (4, 0),  # rows
        (4, 7),
        (4, 65),
        (5, 0),  # one split, of a slice of several tokens
    ],
)
def test_a_piece_that_points_elsewhere_is_refused(position: int, value: int) -> None:
    piece = list(WHOLE)
    piece[position] = value
    with pytest.raises(ValueError, match="piece does not fit"):
        replace(Call(), pieces=integers(piece, num_fields=7))()


@pytest.mark.parametrize("split_and_slot", [(0, -1), (0, 2), (1, 0), (0, 1 << 62)])
def test_a_split_that_is_not_there_or_has_no_room_is_refused(split_and_slot: tuple[int, int]) -> None:
    pieces = integers([0, 4, 0, 0, 2, *split_and_slot], num_fields=7)
    with pytest.raises(ValueError, match="piece does not fit"):
        replace(Call(), pieces=pieces)()


@pytest.mark.parametrize("merge", [[-1, 0, 1], [3, 0, 1], [0, -1, 1], [0, 0, 0], [0, 1, 2], [0, 1, 1 << 62]])
def test_a_merge_that_points_elsewhere_is_refused(merge: list[int]) -> None:
    with pytest.raises(ValueError, match="merge does not fit"):
        replace(Call(), merges=integers(merge, num_fields=3))()


@pytest.mark.parametrize("slot", [-1, 20, 1 << 62])
def test_a_slot_outside_the_storage_is_refused_before_anything_is_written(slot: int) -> None:
    call = replace(Call(), slots=integers([12, 13, slot]))
    with pytest.raises(ValueError, match="slot is outside"):
        call()
    assert not any(tensor.any() for tensor in call.storage)


@pytest.mark.parametrize("block", [-1, 5])
def test_a_block_outside_the_storage_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="block is outside"):
        replace(Call(), tables=integers([2, block]))()


@pytest.mark.parametrize(
    "spoilt",
    [
        {"rows": [torch.randn(3, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]},
        {"rows": [torch.randn(3, heads, 8) for heads in (5, 2, 2)]},
        {"rows": [torch.randn(num, heads, 8) for num, heads in ((3, 4), (2, 2), (3, 2))]},
        {"rows": [torch.randn(3, 8, heads).transpose(1, 2) for heads in (4, 2, 2)]},
        {"rows": [torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 1, 8)]},
        {"storage": [torch.zeros(5, 2, 8, 4), torch.zeros(5, 2, 8, 4)]},
        {"storage": [torch.zeros(5, 2, 8, 4).half(), torch.zeros(5, 2, 4, 8).half()]},
        {"storage": [torch.zeros(5, 2, 8, 4).char(), torch.zeros(5, 2, 4, 8).char()]},
        {"storage": [torch.zeros(5, 2, 8, 4), torch.zeros(5, 2, 4, 8), torch.zeros(5, 2, 4), torch.zeros(5, 2, 4)]},
        {"storage": [torch.zeros(5, 1, 8, 4), torch.zeros(5, 1, 4, 8)]},
        {"storage": [torch.zeros(5, 2, 8, 8)[..., ::2], torch.zeros(5, 2, 4, 8)]},
        {"slots": integers([12, 13])},
        {"slots": integers([12, 13, 14]).int()},
        {"tables": integers([2, 3]).int()},
        {"pieces": integers(WHOLE)},
        {"merges": integers([0, 0], num_fields=2)},
        {"workspace": [torch.zeros(8), torch.zeros(0)]},
        {"workspace": [torch.zeros(workspace_floats(8)).double(), torch.zeros(0)]},
        {"window": -1},
    ],
)
def test_tensors_of_another_kind_or_shape_are_refused(spoilt: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="paged_attention: "):
        replace(Call(), **spoilt)()


def test_it_is_a_proper_operator() -> None:
    call = Call()
    torch.library.opcheck(torch.ops.mixtral_serve.paged_attention.default, call.arguments)
