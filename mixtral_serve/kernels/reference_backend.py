"""The oracle: what a product with packed weights and quantised activations is, as exactly as fp32 can say it.

Owns the definition that the other backends are measured against. Activations are quantised row by row to 8 bits, as
theirs are, so that what is left between a backend and this one is rounding, and error bounds can be tight: a sum of
integer products is exact in fp64, and the result is rounded to fp32 once. Sums over experts are fp64 as well.

Weights stay packed and are unpacked a few hundred rows at a time, in every call: as little memory as any backend, and
far too slow to serve with anything but small models.

Rejected: activations in floating point (then the distance to a backend would mostly be the quantisation of
activations, which is the format's and not the backend's).
"""

from __future__ import annotations

from typing import Final

import torch

from mixtral_serve.kernels.backend import ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import TILE_ROWS, Kind, PackedMatrix, integers, row_scales
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.routing import Routing

EIGHT_BITS: Final = 127
_TILES_AT_ONCE: Final = 32


class ReferenceBackend:
    """Implements ``Backend`` for both kinds, everywhere.

    Args:
        activation_levels: what the largest magnitude of a row of activations becomes: 127 with 8 bits. With another
            number it is the oracle of a backend that keeps fewer.
    """

    name: BackendName = "reference"
    label = "reference"
    is_row_invariant = False
    """fp64 products may be summed in any order; what is left of that after rounding to fp32 is rare, but there."""

    def __init__(self, activation_levels: int = EIGHT_BITS) -> None:
        self._levels = activation_levels

    def missing(self, kind: Kind) -> str | None:  # noqa: ARG002 - it computes with every kind
        """Nothing is."""
        return None

    def linear(self, weight: PackedMatrix) -> LinearOp:
        """See the protocol."""
        return lambda x: _multiply(x, weight, self._levels)

    def experts(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> ExpertsOp:
        """See the protocol."""

        def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            routing = Routing.of(ids, weights.double(), w1.quants.shape[0])
            rows = routing.sort(hidden)
            out = torch.empty_like(rows)
            for expert, first, end in routing.spans:
                mine = rows[first:end]
                gate, up = (_multiply(mine, matrix[expert], self._levels).double() for matrix in (w1, w3))
                inner = (gate * gate.sigmoid() * up).float()
                out[first:end] = _multiply(inner, w2[expert], self._levels)
            return routing.combine(out.double()).float()

        return run


def _multiply(x: torch.Tensor, weight: PackedMatrix, levels: int) -> torch.Tensor:
    """``x`` [rows, num_cols] fp32 times one packed matrix: [rows, num_rows] fp32."""
    values, scales = quantize_rows(x, levels)
    padded = torch.nn.functional.pad(values.double(), (0, -x.shape[1] % 32))
    out = torch.empty(x.shape[0], weight.quants.shape[0] * TILE_ROWS, dtype=torch.float64)
    for first in range(0, weight.quants.shape[0], _TILES_AT_ONCE):
        tiles = slice(first, first + _TILES_AT_ONCE)
        part = PackedMatrix(weight.kind, 0, 0, weight.quants[tiles], weight.scales[tiles])
        dense = integers(part).double()
        group_scales = row_scales(part)
        scaled = (dense.view(dense.shape[0], group_scales.shape[1], -1) * group_scales.unsqueeze(-1)).view(dense.shape)
        out[:, first * TILE_ROWS : first * TILE_ROWS + dense.shape[0]] = padded @ scaled.t()
    return (out[:, : weight.num_rows] * scales.double()).float()


def quantize_rows(x: torch.Tensor, levels: int = EIGHT_BITS) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [rows, cols] fp32 -> int8 values [rows, cols] and fp32 scales [rows, 1].

    The largest magnitude of a row becomes ``levels``; ties round to even. A row of zeros, or of values so small that
    their inverse overflows, has scale 0. A row that is not finite has scale NaN.
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    # `levels / largest` would round twice: it takes the inverse first.
    factors = torch.full_like(largest, levels) / largest
    is_zero = factors.isinf()
    values = (x * factors.where(~is_zero, 0)).nan_to_num(0.0, 0.0, 0.0).round().to(torch.int8)
    scales = (largest / levels).where(~is_zero, 0)
    return values, scales.where(largest.isfinite(), torch.nan)
