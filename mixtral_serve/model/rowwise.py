"""Norms, routers and rotary embedding of a built model, swapped for ones whose rows do not depend on each other.

Owns: ``make_row_invariant`` and the three modules it puts in place of Transformers' own. They hold the same parameters
under the same names and answer what the modules around them expect, so weights can be loaded before or after.

Invariants: a row's result has the same bits in any batch and for any number of threads. Activations and the weights
held here are fp32.

Rejected: the cosine of PyTorch (its vector code and the scalar code for what is left over differ in the last bit, so
a position's value depends on where in the batch it stands); patching Transformers' classes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import MixtralForCausalLM

from mixtral_serve.kernels.native_rowwise import rotary_table


class RowInvariantNorm(nn.Module):
    """RMS norm over the last dimension.

    Args:
        weight: fp32 [hidden]; the parameter is shared, not copied.
        eps: added to the mean of squares.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden], fp32."""
        normed: torch.Tensor = torch.ops.mixtral_serve.rms_norm.default(hidden_states, self.weight, self.eps)
        return normed


class RowInvariantRouter(nn.Module):
    """Which experts a row goes to, and with what weight.

    Args:
        weight: fp32 [experts, hidden]; the parameter is shared, not copied.
        top_k: experts per row.
    """

    def __init__(self, weight: nn.Parameter, top_k: int) -> None:
        super().__init__()
        self.weight = weight
        self.top_k = top_k

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., hidden] -> logits [rows, experts], weights [rows, k] and expert ids [rows, k]."""
        rows = hidden_states.reshape(-1, self.weight.shape[1])
        logits, weights, experts = torch.ops.mixtral_serve.route.default(rows, self.weight, self.top_k)
        return logits, weights, experts


class RotaryTable(nn.Module):
    """Cosines and sines of every position, computed once.

    Args:
        frequencies: fp32 [head_dim / 2], radians per position.
        num_positions: positions 0 to so many can be asked for.
        attention_scaling: factor of both.
    """

    def __init__(self, frequencies: torch.Tensor, num_positions: int, attention_scaling: float = 1.0) -> None:
        super().__init__()
        cosine, sine = rotary_table(frequencies, num_positions)
        self.cosine = nn.Buffer(cosine.mul_(attention_scaling), persistent=False)
        self.sine = nn.Buffer(sine.mul_(attention_scaling), persistent=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [1, rows] -> cosines and sines [1, rows, head_dim] in the dtype of ``x``."""
        cosine, sine = (table.index_select(0, position_ids[0]) for table in (self.cosine, self.sine))
        both = (torch.cat((half, half), dim=-1).unsqueeze(0).to(x.dtype) for half in (cosine, sine))
        return next(both), next(both)


def make_row_invariant(model: MixtralForCausalLM) -> None:
    """Swap every norm, every router and the rotary embedding of ``model``, in place.

    The model may still be empty (parameters without storage); when it runs, norms and routers must be fp32.

    Raises:
        NativeUnavailableError: there are no compiled kernels.
    """
    inner = model.model
    rotary = inner.rotary_emb
    inner.rotary_emb = RotaryTable(rotary.inv_freq, model.config.max_position_embeddings, rotary.attention_scaling)
    inner.norm = RowInvariantNorm(inner.norm.weight, inner.norm.variance_epsilon)
    for layer in inner.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, name)
            setattr(layer, name, RowInvariantNorm(norm.weight, norm.variance_epsilon))
        layer.mlp.gate = RowInvariantRouter(layer.mlp.gate.weight, layer.mlp.gate.top_k)


def row_invariant_bytes(head_dim: int, num_positions: int) -> int:
    """Bytes that ``make_row_invariant`` adds to a model: the rotary table."""
    return 4 * head_dim * num_positions
