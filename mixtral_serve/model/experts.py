"""Mixtral's experts over a ragged batch: each touched expert is one product, whoever sent it rows.

Owns: the experts function registered with Transformers' experts interface. Rows are sorted by expert once; the rows
of one expert are then contiguous, gate and up are one product (the parameters are fused), the activation runs
over all rows at once, and the results go back to their tokens by a permutation.

Invariants: no capacity limit and no dropped row, so a token's result does not depend on what its batch-mates chose; the
results of a token's experts are added in ascending expert id, whatever the batch.

Rejected: Transformers' eager loop (a mask and an ``index_add_`` per expert) and its ``batched_mm`` (copies the
weights of an expert once per row).
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixtral_serve.kernels.routing import Routing

EXPERTS: Final = "mixtral_sorted"


def register_experts() -> None:
    """Make ``EXPERTS`` known to Transformers. Doing so twice is fine."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, sorted_experts_forward)


def sorted_experts_forward(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of each row's chosen experts.

    Args:
        module: a ``MixtralExperts``: ``gate_up_proj`` [experts, 2 * inner, hidden] and ``down_proj``
            [experts, hidden, inner].
        hidden_states: [rows, hidden].
        top_k_index: [rows, k], expert ids.
        top_k_weights: [rows, k], their weights.

    Returns:
        [rows, hidden] in the dtype of ``hidden_states``.
    """
    gate_up_proj: torch.Tensor = module.gate_up_proj  # type: ignore[assignment]  # a module may answer anything
    down_proj: torch.Tensor = module.down_proj  # type: ignore[assignment]  # a module may answer anything
    routing = Routing.of(top_k_index, top_k_weights, gate_up_proj.shape[0])
    rows = routing.sort(hidden_states)
    gate_up = rows.new_empty(rows.shape[0], gate_up_proj.shape[1])
    for expert, first, end in routing.spans:
        torch.mm(rows[first:end], gate_up_proj[expert].t(), out=gate_up[first:end])
    gate, up = gate_up.chunk(2, dim=-1)
    inner = functional.silu(gate).mul_(up)
    out = torch.empty_like(rows)
    for expert, first, end in routing.spans:
        torch.mm(inner[first:end], down_proj[expert].t(), out=out[first:end])
    return routing.combine(out).to(hidden_states.dtype)
