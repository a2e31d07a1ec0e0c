"""``ModelShape``: what a Mixtral is made of, in numbers, and the tensors that follow from them.

Owns: the numbers that the accountant, the loader and the runner need, the list of tensors that a checkpoint
of this shape holds under the names used on the Hub, and how many bytes they take in each form that weights are held
in. Imports no tensor library: reading a shape is instant.

Rejected: passing Transformers' config around. It is mutable, has some fifty fields, and needs a
two-second import to answer how many layers there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Weights: TypeAlias = Literal["fp32", "bf16", "int8", "int4"]
"""How weights are held in memory. fp32 and bf16 hold every tensor so; int8 and int4 pack the large matrices."""
Packing: TypeAlias = Literal["int8", "int4"]
"""The forms of a packed matrix."""
KVDtype: TypeAlias = Literal["fp32", "bf16", "int8"]
"""How keys and values are held; int8 with one fp32 scale per token and head, for keys and for values."""

BYTES_PER_ELEMENT: Final[dict[Weights, int]] = {"fp32": 4, "bf16": 2}
"""Of the forms that hold every tensor alike."""
KV_BYTES_PER_ELEMENT: Final[dict[KVDtype, int]] = {"fp32": 4, "bf16": 2, "int8": 1}
KV_SCALE_BYTES: Final[dict[KVDtype, int]] = {"fp32": 0, "bf16": 0, "int8": 4}
"""Of one token's keys (or values) in one head."""

ROW_TILE: Final = 16
"""A packed matrix has a multiple of so many outputs; the others are zero."""
GROUP_SIZE: Final = 32
"""Inputs that share one int4 multiplier; every packed matrix has a multiple of so many inputs."""
SECTION_SIZE: Final = 128 * GROUP_SIZE
"""Inputs that share one int4 scale."""


def int4_scale_bytes(num_cols: int) -> int:
    """Of one tile of rows: an fp32 scale per row and section, and a multiplier of one byte per row and group."""
    return ROW_TILE * (4 * -(-num_cols // SECTION_SIZE) + -(-num_cols // GROUP_SIZE))


def packed_bytes(packing: Packing, num_rows: int, num_cols: int) -> int:
    """Bytes of a packed matrix of ``num_rows`` outputs and ``num_cols`` inputs, padding and scales included.

    int4: half a byte per weight, a byte per group of 32 inputs and output, and an fp32 scale per section of 4096 inputs
    and output. int8: a byte per weight and an fp32 scale per output.
    """
    rows = -(-num_rows // ROW_TILE) * ROW_TILE
    cols = -(-num_cols // GROUP_SIZE) * GROUP_SIZE
    if packing == "int4":
        return rows * cols // 2 + rows // ROW_TILE * int4_scale_bytes(num_cols)
    return rows * cols + 4 * rows


def kv_dtype_for(weights: Weights, wanted: KVDtype | Literal["auto"] = "auto") -> KVDtype:
    """The form of keys and values; ``auto`` is fp32 beside fp32 weights and bf16 beside all others."""
    if wanted != "auto":
        return wanted
    return "fp32" if weights == "fp32" else "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Mixtral's dimensions and the few constants that change what it computes."""

    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    intermediate_size: int
    """Width of one expert."""
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_token: int
    max_model_len: int
    """Positions the model was made for."""
    sliding_window: int | None = None
    """How many positions a token sees, itself included; None: all before it."""
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    tied: bool = False
    """Whether the head is the embedding."""
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def num_parameters(self) -> int:
        """Parameters held in memory; a tied head counts once."""
        per_expert = 3 * self.hidden_size * self.intermediate_size
        heads = 2 * self.num_query_heads + 2 * self.num_kv_heads
        per_layer = (
            self.num_experts * (per_expert + self.hidden_size)
            + heads * self.head_dim * self.hidden_size
            + 2 * self.hidden_size
        )
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * per_layer + embeddings + self.hidden_size

    def weights_bytes(self, weights: Weights) -> int:
        """Bytes of all parameters in memory.

        Packed are experts, attention projections and the head; a tied head is packed besides the embedding. Beside
        packed matrices the embedding is bf16, routers and norms are fp32.
        """
        if weights == "fp32" or weights == "bf16":
            return self.num_parameters * BYTES_PER_ELEMENT[weights]
        hidden, inner = self.hidden_size, self.intermediate_size
        query, kv = self.num_query_heads * self.head_dim, self.num_kv_heads * self.head_dim
        experts = 2 * packed_bytes(weights, inner, hidden) + packed_bytes(weights, hidden, inner)
        attention = (
            packed_bytes(weights, query, hidden)
            + 2 * packed_bytes(weights, kv, hidden)
            + packed_bytes(weights, hidden, query)
        )
        router_and_norms = 4 * (self.num_experts * hidden + 2 * hidden)
        per_layer = self.num_experts * experts + attention + router_and_norms
        embedding, final_norm = 2 * self.vocab_size * hidden, 4 * hidden
        return self.num_layers * per_layer + embedding + final_norm + packed_bytes(weights, self.vocab_size, hidden)

    def hub_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that a checkpoint of this shape must hold, as published on the Hub.

        A tied head is not in the list.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        query, kv = self.num_query_heads * self.head_dim, self.num_kv_heads * self.head_dim
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            tensors[f"{prefix}.self_attn.q_proj.weight"] = (query, hidden)
            tensors[f"{prefix}.self_attn.k_proj.weight"] = (kv, hidden)
            tensors[f"{prefix}.self_attn.v_proj.weight"] = (kv, hidden)
            tensors[f"{prefix}.self_attn.o_proj.weight"] = (hidden, query)
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (self.num_experts, hidden)
            for expert in range(self.num_experts):
                name = f"{prefix}.block_sparse_moe.experts.{expert}"
                tensors[f"{name}.w1.weight"] = (inner, hidden)
                tensors[f"{name}.w2.weight"] = (hidden, inner)
                tensors[f"{name}.w3.weight"] = (inner, hidden)
            tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
            tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        tensors["model.norm.weight"] = (hidden,)
        if not self.tied:
            tensors[HEAD] = (self.vocab_size, hidden)
        return tensors


HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
