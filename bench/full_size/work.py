"""How much work a step is, in units that a machine has rates for: bytes to read, operations to do.

Owns: ``Work`` and ``WorkSizes``, which turns a plan into it. Pure arithmetic on a model's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixtral_serve.model.shape import KV_BYTES_PER_ELEMENT, KV_SCALE_BYTES, KVDtype, ModelShape, Packing, packed_bytes
from scheduler.plan import StepPlan


class Work(NamedTuple):
    """One step."""

    layers: float
    """Layers that are passed."""
    weight_bytes: float
    """Packed weights that are read: attention, touched experts, and the head."""
    operations: float
    """Additions and multiplications of the products with weights."""
    kv_bytes: float
    """Keys and values that are read."""
    pairs: float
    """Scores: a query and a key, in one layer, over all heads."""
    sampled: float
    """Tokens that are sampled."""


class WorkSizes:
    """The work of steps of one model.

    Args:
        shape: of the model.
        kind: how its weights are packed.
        kv_dtype: how its keys and values are held.
    """

    def __init__(self, shape: ModelShape, kind: Packing, kv_dtype: KVDtype) -> None:
        self.shape = shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        query, kv = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.expert_bytes = 2 * packed_bytes(kind, inner, hidden) + packed_bytes(kind, hidden, inner)
        self.attention_bytes = (
            packed_bytes(kind, query, hidden) + 2 * packed_bytes(kind, kv, hidden) + packed_bytes(kind, hidden, query)
        )
        self.head_bytes = packed_bytes(kind, shape.vocab_size, hidden)
        attention_weights = 2 * hidden * (query + kv)
        self.row_operations = 2 * (shape.num_experts_per_token * 3 * hidden * inner + attention_weights)
        """Of one row in one layer."""
        self.head_operations = 2 * shape.vocab_size * hidden
        vector = shape.head_dim * KV_BYTES_PER_ELEMENT[kv_dtype] + KV_SCALE_BYTES[kv_dtype]
        self.kv_token_bytes = 2 * shape.num_kv_heads * vector
        """Of one token in one layer."""

    def of(self, plan: StepPlan, touched: float | Callable[[int], float]) -> Work:
        """The work of ``plan``; ``touched`` experts per layer, as counted or as expected for a number of rows."""
        layers, num_rows = self.shape.num_layers, plan.num_tokens
        num_sampled = sum(part.samples for part in plan.slices)
        num_experts = touched(num_rows) if callable(touched) else touched
        context = sum(part.start + part.num_tokens for part in plan.slices)
        pairs = sum(part.num_tokens * (part.start + (part.num_tokens + 1) / 2) for part in plan.slices)
        return Work(
            layers=layers,
            weight_bytes=layers * (num_experts * self.expert_bytes + self.attention_bytes)
            + (self.head_bytes if num_sampled else 0),
            operations=layers * num_rows * self.row_operations + num_sampled * self.head_operations,
            kv_bytes=layers * context * self.kv_token_bytes,
            pairs=layers * pairs,
            sampled=num_sampled,
        )
