"""Configurations of published models, without their weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def mixtral_8x7b(tmp_path: Path) -> Path:
    """The configuration of Mixtral-8x7B, without its weights."""
    directory = tmp_path / "Mixtral-8x7B"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    return directory
