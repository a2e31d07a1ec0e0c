"""The model with packed weights: modules that hold ``PackedMatrix`` and call a backend's operation.

Owns: which modules of Transformers' Mixtral are replaced (the projections of attention, the experts, the head and the
embedding), and under which names their storage is to be filled; ``packed_layout`` has the same names.

The way of a model: ``hold_packed`` replaces the modules of an empty model and gives everything storage;
``packed_places`` says what is to be filled, by whom ever; ``native_layers.hand_over``, or ``compute_with`` where every
module stays one of its own, hands the filled matrices to a backend and from then on the model runs.

Invariants: activations are fp32 between all modules. The embedding is held in bf16 and becomes fp32 at the look-up;
norms and router are held in fp32. A tied head is packed besides the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import nn
from transformers import MixtralForCausalLM

from mixtral_serve.kernels.backend import Backend, ExpertsOp, LinearOp
from mixtral_serve.kernels.formats import Kind, PackedMatrix

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias whose weight is packed; [..., num_cols] fp32 -> [..., num_rows] fp32."""

    def __init__(self, kind: Kind, num_rows: int, num_cols: int) -> None:
        super().__init__()
        self.num_rows, self.num_cols = num_rows, num_cols
        self.weight: PackedMatrix | None = PackedMatrix.empty(kind, num_rows, num_cols)
        """None once a backend has it."""
        self._multiply: LinearOp | None = None

    def take_weight(self) -> PackedMatrix:
        """The filled weight, which is the caller's from now on."""
        assert self.weight is not None, "the weight was handed over before"
        weight, self.weight = self.weight, None
        return weight

    def compute_with(self, backend: Backend) -> None:
        """Hand the filled weight over; the backend keeps it or what it makes of it."""
        self._multiply = backend.linear(self.take_weight())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        assert self._multiply is not None, "no backend has the weight yet"
        return self._multiply(x.reshape(-1, self.num_cols)).view(*x.shape[:-1], self.num_rows)


class PackedExperts(nn.Module):
    """``MixtralExperts`` whose weights are packed; all experts of a layer in one ``PackedMatrix`` per role."""

    def __init__(self, kind: Kind, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        up = (kind, intermediate_size, hidden_size)
        self.weights: dict[str, PackedMatrix] = {
            "w1": PackedMatrix.empty(*up, num_matrices=num_experts),
            "w2": PackedMatrix.empty(kind, hidden_size, intermediate_size, num_matrices=num_experts),
            "w3": PackedMatrix.empty(*up, num_matrices=num_experts),
        }
        """By role, as the Hub names them; empty once a backend has them."""
        self._run: ExpertsOp | None = None

    def take_weights(self) -> dict[str, PackedMatrix]:
        """The filled weights by role, which are the caller's from now on."""
        weights, self.weights = self.weights, {}
        return weights

    def compute_with(self, backend: Backend) -> None:
        """Hand the filled weights over; the backend keeps them or what it makes of them."""
        weights = self.take_weights()
        self._run = backend.experts(weights["w1"], weights["w2"], weights["w3"])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each row's chosen experts, in the signature of ``MixtralExperts``."""
        assert self._run is not None, "no backend has the weights yet"
        return self._run(hidden_states, top_k_index, top_k_weights)


class HalfEmbedding(nn.Embedding):
    """An embedding held in bf16 that gives fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - PyTorch's name
        """[...] ids -> [..., hidden] fp32."""
        return super().forward(input).float()


def hold_packed(model: MixtralForCausalLM, kind: Kind) -> None:
    """Make the empty ``model`` one that holds ``kind`` weights; all storage is allocated, nothing is filled."""
    config = model.config
    for layer in model.model.layers:
        for name in PROJECTIONS:
            dense = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, PackedLinear(kind, dense.out_features, dense.in_features))
        layer.mlp.experts = PackedExperts(
            kind,
            num_experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )
    model.lm_head = PackedLinear(kind, config.vocab_size, config.hidden_size)
    model.model.embed_tokens = HalfEmbedding(
        config.vocab_size, config.hidden_size, config.pad_token_id, device="meta", dtype=torch.bfloat16
    )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = torch.bfloat16 if isinstance(module, HalfEmbedding) else torch.float32
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    model.train(False)


def packed_places(model: MixtralForCausalLM) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    """Name -> what is to be filled, for a model that ``hold_packed`` has prepared, in the order of the layers.

    Packed matrices: ``model.layers.L.self_attn.q_proj`` (and k, v, o), ``model.layers.L.block_sparse_moe.experts.w1``
    (and w2, w3; all experts along the leading dimension), ``lm_head``. Plain tensors have the Hub's names: the
    embedding (bf16), norms and routers (fp32).
    """
    for name, module in model.named_modules():
        hub = name.replace(".mlp", ".block_sparse_moe")
        if isinstance(module, PackedLinear):
            assert module.weight is not None, "the weight was handed over before"
            yield hub, module.weight
        elif isinstance(module, PackedExperts):
            for role, matrices in module.weights.items():
                yield f"{hub}.{role}", matrices
        else:
            for leaf, parameter in module.named_parameters(recurse=False):
                yield f"{hub}.{leaf}", parameter.data


def compute_with(model: MixtralForCausalLM, backend: Backend) -> None:
    """Hand every filled matrix that a module of ``model`` still has to ``backend``: each is released as it is taken."""
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedExperts):
            module.compute_with(backend)
