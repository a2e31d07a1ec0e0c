"""The published Mixtrals, so that memory can be planned before anything was downloaded.

Owns: their dimensions, as their publishers' configuration files state them. A directory always counts for more than a
name: ``known_shape`` is asked only where there is no such directory.
"""

from __future__ import annotations

from typing import Final

from mixtral_serve.model.shape import ModelShape

KNOWN_MODELS: Final = {
    "mixtral-8x7b": ModelShape(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_token=2,
        max_model_len=32_768,
    ),
    # The instruct model has the larger vocabulary of the two that were published; the base model has 32,000.
    "mixtral-8x22b": ModelShape(
        vocab_size=32_768,
        hidden_size=6144,
        intermediate_size=16_384,
        num_layers=56,
        num_query_heads=48,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_token=2,
        max_model_len=65_536,
    ),
}


def known_shape(name: str) -> ModelShape | None:
    """The shape of a published model, by its short name; None for any other name."""
    return KNOWN_MODELS.get(name.lower())
