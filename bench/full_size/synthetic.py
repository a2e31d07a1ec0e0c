"""Weights that nobody trained, made where they stay: tens of gigabytes in seconds.

Owns: ``fill_synthetic``. A block of random bytes is copied again and again, by all of PyTorch's threads, so every page
is touched and nothing but the copy costs time; each tensor begins at another place of the block, whose length is odd,
so that no two matrices are equal.

What matters for a measurement is kept: quantised values are uniform with mean 0 (a mean would grow from layer to layer
until all tokens look alike and go to the same experts), scales make the standard deviation of a weight
``1 / sqrt(columns)``, so that activations keep their size, and routers and embeddings are random, so that tokens
spread over the experts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Final

import torch

from mixtral_serve.kernels.formats import GROUP_COLS, TILE_ROWS, Kind, PackedMatrix
from mixtral_serve.model.shape import EMBEDDING

_BLOCK_ELEMENTS: Final = (1 << 25) + 1
_SMALL_BLOCK_ELEMENTS: Final = (1 << 22) + 1
_GAIN_OF_ROUTERS: Final = 2.0
"""Scores that are well apart: each expert is chosen for a reason, and by another token than its neighbour."""

_MEAN_MULTIPLIER: Final = 100.0
QUANT_STD: Final[dict[Kind, float]] = {"int4": math.sqrt((15**2 - 1) / 12), "int8": math.sqrt((255**2 - 1) / 12)}
"""Of quantised values that are uniform from -7 to 7, and from -127 to 127."""


def fill_synthetic(
    places: Iterable[tuple[str, PackedMatrix | torch.Tensor]],
    *,
    seed: int = 0,
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Fill everything that ``quantized.packed_places`` names; whether ``go_on`` allowed it to come to the end.

    Raises:
        ValueError: a matrix has padding, whose values must be zero and not random.
    """
    noise = _Noise(seed)
    for name, place in places:
        if not go_on():
            return False
        if isinstance(place, PackedMatrix):
            if place.num_rows % TILE_ROWS or place.num_cols % GROUP_COLS:
                raise ValueError(f"{name} [{place.num_rows}, {place.num_cols}] has padding")
            noise.fill(place.quants, noise.quants(place.kind))
            factor = 1 / (QUANT_STD[place.kind] * math.sqrt(place.num_cols))
            noise.fill_scales(place, factor)
        elif place.dim() == 1:
            place.copy_(1 + 0.1 * torch.randn(place.shape, generator=noise.generator))
        else:
            gain = 1.0 if name == EMBEDDING else _GAIN_OF_ROUTERS / math.sqrt(place.shape[1])
            noise.fill(place, noise.normal(place.dtype), gain)
    return True


class _Noise:
    """Blocks of random numbers, each drawn when it is first asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._starts = random.Random(seed)
        self._blocks: dict[object, torch.Tensor] = {}

    def quants(self, kind: Kind) -> torch.Tensor:
        """Stored values: bytes 1 to 255, or two nibbles 1 to 15 each."""

        def draw() -> torch.Tensor:
            if kind == "int8":
                return self._bytes(1, 256)
            return self._bytes(1, 16) | (self._bytes(1, 16) << 4)

        return self._kept(kind, draw)

    def fill_scales(self, place: PackedMatrix, factor: float) -> None:
        """About ``factor``, a quarter up or down."""
        if place.kind == "int8":
            self.fill(place.scales, self._kept("scales", lambda: self._between(0.75, 1.25)), factor)
            return
        self.fill(place.scales, self._kept("multipliers", self._multipliers))
        for section in place.sections():
            section.scales.fill_(factor / _MEAN_MULTIPLIER)

    def normal(self, dtype: torch.dtype) -> torch.Tensor:
        """Mean 0 and standard deviation 1."""
        return self._kept(dtype, lambda: torch.randn(_SMALL_BLOCK_ELEMENTS, generator=self.generator).to(dtype))

    def fill(self, place: torch.Tensor, block: torch.Tensor, gain: float = 1.0) -> None:
        """Copy ``block`` into all of ``place``, from a random position on, times ``gain``."""
        flat = place.view(-1)
        start, begin = self._starts.randrange(block.numel()), 0
        while begin < flat.numel():
            piece = block[start : start + flat.numel() - begin]
            flat[begin : begin + piece.numel()].copy_(piece)
            start, begin = 0, begin + piece.numel()
        if gain != 1.0:
            flat.mul_(gain)

    def _multipliers(self) -> torch.Tensor:
        return self._between(0.75, 1.25).mul_(_MEAN_MULTIPLIER).to(torch.uint8)

    def _between(self, least: float, end: float) -> torch.Tensor:
        return torch.rand(_SMALL_BLOCK_ELEMENTS, generator=self.generator) * (end - least) + least

    def _bytes(self, least: int, end: int) -> torch.Tensor:
        return torch.randint(least, end, (_BLOCK_ELEMENTS,), dtype=torch.uint8, generator=self.generator)

    def _kept(self, key: object, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._blocks:
            self._blocks[key] = draw()
        return self._blocks[key]
