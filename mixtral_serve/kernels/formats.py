"""int4 and int8 weights: how they are quantised, and how they lie in memory.

A matrix [num_rows, num_cols] (outputs, inputs) is cut into tiles of 16 rows; within a tile the bytes lie in the
order in which the kernels read them, one 64-byte line after another. All tensors are dense and can be stored as
they are.

    int8    value = q * scale[row], q in -127..127, stored as the byte q + 128
            quants  uint8 [tiles, cols / 4, 64]     byte 4 * r + j of line c: row r of the tile, column 4 * c + j
            scales  fp32  [tiles, 16]
    int4    value = q * multiplier[row, group] * scale[row, section], q in -8..7, multipliers in -127..127,
            groups of 32 columns, sections of 128 groups (the last may be shorter)
            quants  uint8 [tiles, cols / 32, 256]   q + 8: byte 64 * v + 4 * r + j of group g: row r,
                                                    low nibble: column 32 * g + 8 * v + j, high nibble: 4 further
            scales  uint8 [tiles, bytes]            section after section: fp32 scales [16], then the
                                                    multipliers of its groups, int8 [groups, 16]

Stored values are unsigned because the byte products of x86 take one unsigned operand; a kernel takes the offset back
with the sum of the row it multiplies by. The scale of an int4 group is a small integer times that of its section, so
that sums stay integers, and exact, over 4096 columns: no order of additions can change them. Columns are padded to a
multiple of 32 with q = 0 and rows to a multiple of 16 with q = 0 and scale 0. Several matrices of one shape (experts)
share tensors with a leading dimension.

Rejected: a scale in floating point per group (a conversion and a multiplication per group, half of the arithmetic where
instructions multiply whole tiles, and a twentieth more bytes to read); separate tensors per expert (thousands of
small files' worth of headers, and nothing gained).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

import torch

from mixtral_serve.kernels.pages import untouched

Kind: TypeAlias = Literal["int8", "int4"]

TILE_ROWS: Final = 16
GROUP_COLS: Final = 32
SECTION_GROUPS: Final = 128
SCALE_BYTES: Final = 4
"""Of one int4 scale in fp32; a multiplier takes one."""

_CHUNK_ELEMENTS: Final = 1 << 19
"""Quantised at once: intermediates of a few megabytes stay in the caches, whatever the size of the matrix."""
_DIVISORS: Final = (-8.0, -7.5, -7.0, -8.5, 7.5)
"""Of a group's largest value: the int4 scales that are tried. The first wins among equals."""
_MAX_MULTIPLIER: Final = 127


def int4_tile_scale_bytes(groups: int) -> int:
    """Of one tile: the scales of its sections and the multipliers of its groups."""
    return TILE_ROWS * (-(-groups // SECTION_GROUPS) * SCALE_BYTES + groups)


@dataclass(frozen=True, slots=True)
class Section:
    """The int4 scales of up to 128 groups of columns: views of a matrix' ``scales``."""

    groups: slice
    scales: torch.Tensor
    """fp32 [..., tiles, 16]."""
    multipliers: torch.Tensor
    """int8 [..., tiles, groups, 16]."""


class NotFiniteError(ValueError):
    """A matrix cannot be quantised: it holds an infinity or a NaN."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One quantised matrix, or several of one shape along a leading dimension."""

    kind: Kind
    num_rows: int
    """Outputs, without padding."""
    num_cols: int
    """Inputs, without padding."""
    quants: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, kind: Kind, num_rows: int, num_cols: int, *, num_matrices: int | None = None) -> Self:
        """Storage without values; ``num_matrices`` adds a leading dimension."""
        tiles, groups = -(-num_rows // TILE_ROWS), -(-num_cols // GROUP_COLS)
        leading = () if num_matrices is None else (num_matrices,)
        if kind == "int8":
            quants = untouched(*leading, tiles, groups * GROUP_COLS // 4, 64, dtype=torch.uint8)
            scales = untouched(*leading, tiles, TILE_ROWS, dtype=torch.float32)
        else:
            quants = untouched(*leading, tiles, groups, 256, dtype=torch.uint8)
            scales = untouched(*leading, tiles, int4_tile_scale_bytes(groups), dtype=torch.uint8)
        return cls(kind, num_rows, num_cols, quants, scales)

    def __getitem__(self, index: int) -> PackedMatrix:
        """One of several, sharing storage."""
        return PackedMatrix(self.kind, self.num_rows, self.num_cols, self.quants[index], self.scales[index])

    def copy_(self, other: PackedMatrix) -> None:
        """Take the values of another matrix of the same kind and shape."""
        assert (self.kind, self.num_rows, self.num_cols) == (other.kind, other.num_rows, other.num_cols)
        self.quants.copy_(other.quants)
        self.scales.copy_(other.scales)

    def sections(self) -> Iterator[Section]:
        """The parts of int4 scales."""
        assert self.kind == "int4"
        groups, begin = self.quants.shape[-2], 0
        for first in range(0, groups, SECTION_GROUPS):
            these = slice(first, min(first + SECTION_GROUPS, groups))
            middle = begin + TILE_ROWS * SCALE_BYTES
            end = middle + TILE_ROWS * (these.stop - first)
            multipliers = self.scales[..., middle:end].view(torch.int8)
            multipliers = multipliers.view(*multipliers.shape[:-1], -1, TILE_ROWS)
            yield Section(these, self.scales[..., begin:middle].view(torch.float32), multipliers)
            begin = end

    def fill_scales(self, value: float) -> None:
        """Give every value about this scale."""
        if self.kind == "int8":
            self.scales.fill_(value)
            return
        for section in self.sections():
            section.scales.fill_(value / _MAX_MULTIPLIER)
            section.multipliers.fill_(_MAX_MULTIPLIER)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.quants.nbytes + self.scales.nbytes


def quantize(weight: torch.Tensor, kind: Kind) -> PackedMatrix:
    """Quantise ``weight`` [num_rows, num_cols] of any floating dtype.

    int8: symmetric, the largest magnitude of a row becomes 127. int4: several scales are tried that make the largest
    magnitude of a group about -8 or 7; each is refitted by least squares to the values it rounds to, and the one with
    the least squared error is taken. The largest of a section is 127 times the section's scale, and the others are
    rounded to a multiple of that, not to zero; values are rounded to what came of it.

    This is the definition; ``quantizer.quantize_matrix`` gives the same bits, faster where it can.

    Raises:
        NotFiniteError: a value is not finite.
    """
    num_rows, num_cols = weight.shape
    packed = PackedMatrix.empty(kind, num_rows, num_cols)
    num_padded = -(-num_cols // GROUP_COLS) * GROUP_COLS
    at_once = TILE_ROWS * max(1, _CHUNK_ELEMENTS // (TILE_ROWS * num_padded))
    for first in range(0, num_rows, at_once):
        part = weight[first : first + at_once]
        if not bool(torch.isfinite(part).all()):
            raise NotFiniteError("holds values that are not finite")
        tiles = slice(first // TILE_ROWS, -(-(first + part.shape[0]) // TILE_ROWS))
        padded = torch.zeros((tiles.stop - tiles.start) * TILE_ROWS, num_padded)
        padded[: part.shape[0], :num_cols] = part
        if kind == "int8":
            packed.quants[tiles], packed.scales[tiles] = _pack_int8(padded)
        else:
            _pack_int4(padded, PackedMatrix(kind, part.shape[0], num_cols, packed.quants[tiles], packed.scales[tiles]))
    return packed


def integers(packed: PackedMatrix) -> torch.Tensor:
    """The quantised values of one matrix, int8 [padded rows, padded columns]."""
    tiles = packed.quants.shape[0]
    if packed.kind == "int8":
        rows = packed.quants.view(tiles, -1, TILE_ROWS, 4).permute(0, 2, 1, 3).reshape(tiles * TILE_ROWS, -1)
        return (rows.to(torch.int16) - 128).to(torch.int8)
    lines = packed.quants.view(tiles, -1, 4, TILE_ROWS, 4)
    both = torch.stack((lines & 15, lines >> 4), dim=4)  # tile, group, line, row, half, column
    rows = both.permute(0, 3, 1, 2, 4, 5).reshape(tiles * TILE_ROWS, -1)
    return rows.to(torch.int8) - 8


def row_scales(packed: PackedMatrix) -> torch.Tensor:
    """Scales of one matrix, fp64 [padded rows, groups]; int8 has one group, the whole row."""
    if packed.kind == "int8":
        return packed.scales.view(-1, 1).double()
    parts = [section.multipliers.double() * section.scales.double().unsqueeze(1) for section in packed.sections()]
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(packed.quants.shape[0] * TILE_ROWS, -1)


def dequantize(packed: PackedMatrix) -> torch.Tensor:
    """The matrix that the quantised values stand for, fp32 [num_rows, num_cols]."""
    values, scales = integers(packed).float(), row_scales(packed).float()
    dense = values.view(values.shape[0], scales.shape[1], -1) * scales.unsqueeze(-1)
    return dense.view(values.shape)[: packed.num_rows, : packed.num_cols].contiguous()


def _pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quants and scales of whole tiles, from ``weight`` fp32 [tiles * 16, padded columns]."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    values = (weight * _inverse(scales)).clamp(-127, 127).round()
    quants = (values + 128).to(torch.uint8)
    lines = quants.view(-1, TILE_ROWS, quants.shape[1] // 4, 4).permute(0, 2, 1, 3)
    return lines.reshape(-1, quants.shape[1] // 4, 64), scales.view(-1, TILE_ROWS)


def _pack_int4(weight: torch.Tensor, packed: PackedMatrix) -> None:
    """Pack whole tiles of ``weight`` fp32 [tiles * 16, padded columns]."""
    groups = weight.view(weight.shape[0], -1, GROUP_COLS)
    best = _best_scales(groups)
    values = torch.empty_like(groups)
    for section in packed.sections():
        these = best[:, section.groups]
        unit = these.abs().amax(dim=1, keepdim=True) / _MAX_MULTIPLIER
        multiples = (these.abs() * _inverse(unit)).clamp(1, _MAX_MULTIPLIER).round() * these.sign()
        values[:, section.groups] = _rounded(groups[:, section.groups], multiples * unit)
        section.scales.copy_(unit.view(-1, TILE_ROWS))
        section.multipliers.copy_(multiples.view(-1, TILE_ROWS, multiples.shape[1]).transpose(1, 2))
    nibbles = (values + 8).to(torch.uint8).view(-1, TILE_ROWS, groups.shape[1], 4, 2, 4)
    low, high = nibbles[..., 0, :], nibbles[..., 1, :]
    lines = (low | (high << 4)).permute(0, 2, 3, 1, 4)  # tile, group, line, row, column
    packed.quants.copy_(lines.reshape(packed.quants.shape))


def _best_scales(groups: torch.Tensor) -> torch.Tensor:
    """For each group of ``groups`` [rows, groups, 32] the scale of least squared error."""
    least, most = groups.aminmax(dim=2, keepdim=True)
    largest = most.where(most >= -least, least)
    best = largest / _DIVISORS[0]
    best_error = torch.full_like(best, torch.inf)
    for divisor in _DIVISORS:
        scales = _fitted(groups, largest / divisor)
        error = _sum_groups((groups - _rounded(groups, scales) * scales).square())
        is_better = error < best_error
        best, best_error = scales.where(is_better, best), error.where(is_better, best_error)
    return best


def _fitted(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Scales fitted by least squares to the values that ``scales`` round to; a group of zeros keeps its own."""
    values = _rounded(groups, scales)
    squares = _sum_groups(values.square())
    fitted = _sum_groups(groups * values) / squares.where(squares > 0, 1)
    return fitted.where(squares > 0, scales)


def _rounded(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (groups * _inverse(scales)).clamp(-8, 7).round()


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where that would overflow: such small weights are zero."""
    inverse = 1 / scales
    return inverse.where(inverse.isfinite(), 0)


def _sum_groups(groups: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, halves added to each other: an order that any implementation can follow."""
    half = GROUP_COLS
    while half > 1:
        half //= 2
        groups = groups[..., :half] + groups[..., half : 2 * half]
    return groups
