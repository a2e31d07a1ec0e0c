"""Decoder layers that the compiled kernels compute whole, all in one call, in place of Transformers' own.

Owns: ``NativeDecoderLayers``, ``fuse_layers``, and ``hand_over``, the last step of loading packed weights.
Transformers' model stays in charge of everything around them: the embedding, positions, the last norm and the head.

Invariant: fused layers have the bits of the modules that they were made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM

from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.native_layers import LayerTensors, NativeLayers
from mixtral_serve.model.native_attention import NativeStep
from mixtral_serve.model.quantized import PROJECTIONS, compute_with

RoutingListener = Callable[[torch.Tensor], None]
"""Called once a step with the experts of every row in every layer, int64 [layers, rows, experts per row]."""


class NativeDecoderLayers(nn.Module):
    """Every ``MixtralDecoderLayer`` of a model with packed weights, as one module.

    Args:
        layers: ones whose projections and experts hold filled ``PackedMatrix`` and whose norms and router are
            ``rowwise``'s. Their weights are taken over, not copied.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        # Modules answer any attribute as far as types go; what is read here was put there by this room.
        whole: list[Any] = list(layers)
        epsilon, num_chosen = whole[0].input_layernorm.eps, whole[0].mlp.gate.top_k
        norms = [norm for layer in whole for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        assert all(norm.eps == epsilon for norm in norms), "a model has one epsilon"
        assert all(layer.mlp.gate.top_k == num_chosen for layer in whole), "and one number of experts per row"
        self.routing_listener: RoutingListener | None = None
        self._layers = NativeLayers([_taken(layer) for layer in whole], num_chosen=num_chosen, epsilon=epsilon)

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
        layers, listener = self._layers, self.routing_listener
        dims = (layers.num_layers, rows.shape[0], layers.num_chosen)
        chosen = None if listener is None else torch.empty(dims, dtype=torch.int64)
        out = layers.run(rows, cosine, sine, attention=step.call, storage=step.cache.layer_addresses, chosen=chosen)
        if listener is not None and chosen is not None:
            listener(chosen)
        return out.unsqueeze(0)


def _taken(layer: Any) -> LayerTensors:
    """The weights of one layer, taken out of its modules."""
    attention, mlp = layer.self_attn, layer.mlp
    dense = {
        "attention_norm": layer.input_layernorm.weight.data,
        "experts_norm": layer.post_attention_layernorm.weight.data,
        "gate": mlp.gate.weight.data,
    }
    projections = {name[0]: getattr(attention, name).take_weight() for name in PROJECTIONS}
    return LayerTensors(dense, projections | mlp.experts.take_weights())


def hand_over(model: MixtralForCausalLM, backend: Backend) -> None:
    """Hand every filled packed weight of ``model`` to ``backend``: all layers at once where it computes them whole."""
    if backend.is_row_invariant:
        fuse_layers(model)
    compute_with(model, backend)


def fuse_layers(model: MixtralForCausalLM) -> None:
    """Put one ``NativeDecoderLayers`` in place of all layers of ``model``, whose packed weights are filled.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    model.model.layers = nn.ModuleList([NativeDecoderLayers(model.model.layers)])
