"""The model that is measured: Mixtral-8x7B's true width, cut to a few layers, with random weights.

A step's time is linear in its layers, so a few of them tell how contenders compare, and fit beside each other.
"""

from __future__ import annotations

from pathlib import Path

from bench.peers.protocol import VOCAB_SIZE
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint


def slice_shape(num_layers: int) -> ModelShape:
    """Mixtral-8x7B's dimensions with ``num_layers`` layers."""
    return ModelShape(
        vocab_size=VOCAB_SIZE,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=num_layers,
        num_query_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_token=2,
        max_model_len=32768,
    )


def prepared_slice(work: Path, num_layers: int) -> Path:
    """The bf16 checkpoint under ``work``; written unless it is there.

    It gets its name when it is complete, so one that was broken off is not taken for one.
    """
    path = work / f"mixtral-{num_layers}-layers"
    if not path.is_dir():
        partial = path.with_name(f"{path.name}.partial")
        write_synthetic_checkpoint(partial, slice_shape(num_layers))
        partial.rename(path)
    return path
