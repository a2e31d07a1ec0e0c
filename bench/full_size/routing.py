"""Which experts the rows of a step go to: what decides how many bytes a step must read.

Owns: ``ExpertCounter``, which listens at the experts of a model, and ``Popularity``, what it learned: how many experts
a batch of any size can be expected to touch. It counts in steps that are not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from mixtral_serve.model.native_layers import NativeDecoderLayers
from mixtral_serve.model.quantized import PackedExperts
from mixtral_serve.model.shape import ModelShape


class Popularity:
    """How likely a row goes to each expert.

    Args:
        shares: by layer and expert; each layer's sum is the number of experts per row.
    """

    def __init__(self, shares: Sequence[Sequence[float]]) -> None:
        self.shares = shares
        self._known: dict[int, float] = {}

    def touched(self, num_rows: int) -> float:
        """Experts that ``num_rows`` independent rows touch in one layer, the mean over the layers."""
        if num_rows not in self._known:
            expected = [sum(1 - (1 - share) ** num_rows for share in layer) for layer in self.shares]
            self._known[num_rows] = sum(expected) / len(expected)
        return self._known[num_rows]

    @property
    def most_popular(self) -> float:
        """The largest share of any expert."""
        return max(max(layer) for layer in self.shares)

    @classmethod
    def even(cls, num_layers: int, num_experts: int, num_experts_per_token: int) -> Popularity:
        """All experts alike."""
        return cls([[num_experts_per_token / num_experts] * num_experts] * num_layers)


class ExpertCounter:
    """Counts the choices of rows while ``listening``."""

    def __init__(self, model: nn.Module, shape: ModelShape) -> None:
        self._fused = [module for module in model.modules() if isinstance(module, NativeDecoderLayers)]
        self._experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
        assert self._fused or self._experts, "the model has packed experts"
        self._num_experts = shape.num_experts
        self._totals = torch.zeros(shape.num_layers, shape.num_experts, dtype=torch.int64)
        self._num_rows = 0
        self._touched: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count inside of the block."""
        self._touched = []
        with ExitStack() as stack:
            for module in self._fused:
                module.routing_listener = self._count_all
                stack.callback(setattr, module, "routing_listener", None)
            for layer, experts in enumerate(self._experts):
                stack.callback(experts.register_forward_pre_hook(functools.partial(self._count_inputs, layer)).remove)
            yield

    @property
    def touched(self) -> float:
        """Experts that one layer touched, the mean over the layers (and steps) of the last block."""
        return sum(self._touched) / len(self._touched)

    def popularity(self) -> Popularity:
        """What all blocks together tell."""
        assert self._num_rows, "something was counted"
        return Popularity((self._totals / self._num_rows).tolist())

    def _count_all(self, ids: torch.Tensor) -> None:
        """Of [layers, rows, k]."""
        for layer, of_layer in enumerate(ids):
            self._count(layer, of_layer)

    def _count_inputs(self, layer: int, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Of what ``PackedExperts`` is called with."""
        self._count(layer, inputs[1])

    def _count(self, layer: int, ids: torch.Tensor) -> None:
        chosen = torch.bincount(ids.reshape(-1), minlength=self._num_experts)
        self._totals[layer] += chosen
        self._touched.append(int((chosen > 0).sum()))
        if layer == 0:
            self._num_rows += ids.shape[0]
