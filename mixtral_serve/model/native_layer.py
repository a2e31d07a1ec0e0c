"""Decoder layers that the compiled kernels compute whole, in place of Transformers' own.

Owns: ``NativeDecoderLayer``, ``fuse_layers``, and ``hand_over``, the last step of loading packed weights. Transformers'
model stays in charge of everything around them: the embedding, positions, the loop over the layers, the last norm and
the head.

Invariant: a fused layer has the bits of the modules that it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM

from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.native_layer import NativeLayer
from mixtral_serve.model.native_attention import NativeStep
from mixtral_serve.model.quantized import PROJECTIONS, compute_with

RoutingListener = Callable[[torch.Tensor], None]
"""Called once a step with the experts of every row, int64 [rows, experts per row]."""


class NativeDecoderLayer(nn.Module):
    """``MixtralDecoderLayer`` with packed weights.

    Args:
        layer: one whose projections and experts hold filled ``PackedMatrix`` and whose norms and router are
            ``rowwise``'s. Its weights are taken over, not copied.
        index: which of the model's layers it is.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        # Modules answer any attribute as far as types go; what is read here was put there by this room.
        whole: Any = layer
        attention, mlp = whole.self_attn, whole.mlp
        assert whole.input_layernorm.eps == whole.post_attention_layernorm.eps
        self._index = index
        self.routing_listener: RoutingListener | None = None
        self._layer = NativeLayer(
            {
                "attention_norm": whole.input_layernorm.weight.data,
                "experts_norm": whole.post_attention_layernorm.weight.data,
                "gate": mlp.gate.weight.data,
            },
            {name[0]: getattr(attention, name).take_weight() for name in PROJECTIONS} | mlp.experts.take_weights(),
            num_chosen=mlp.gate.top_k,
            epsilon=whole.input_layernorm.eps,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: NativeStep,
        **_: object,
    ) -> torch.Tensor:
        """[1, rows, hidden] -> [1, rows, hidden], fp32; cosines and sines are [1, rows, head_dim]."""
        rows, cosine, sine = (tensor[0] for tensor in (hidden_states, *position_embeddings))
        listener = self.routing_listener
        chosen = None if listener is None else torch.empty(rows.shape[0], self._layer.num_chosen, dtype=torch.int64)
        out = self._layer.run(rows, cosine, sine, attention=step.call_for(self._index), chosen=chosen)
        if listener is not None and chosen is not None:
            listener(chosen)
        return out.unsqueeze(0)


def hand_over(model: MixtralForCausalLM, backend: Backend) -> None:
    """Hand every filled packed weight of ``model`` to ``backend``: layer by layer where it computes layers whole."""
    if backend.is_row_invariant:
        fuse_layers(model)
    compute_with(model, backend)


def fuse_layers(model: MixtralForCausalLM) -> None:
    """Put a ``NativeDecoderLayer`` in place of every layer of ``model``, whose packed weights are filled.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = NativeDecoderLayer(layer, index)
