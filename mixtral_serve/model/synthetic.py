"""Random checkpoints of any shape, in the Hub's layout: for tests and measurements, where trained weights do
not matter.

A tensor's values are a function of (seed, tensor name), so that sharding and dtype do not change them, and a
shard is written before the next one is drawn: a true-size checkpoint needs the memory of one shard.

The scales are chosen so that a random model behaves: hidden states keep their size through the layers, router
scores and logits are well apart, and different prompts lead to different answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from mixtral_serve.model.checkpoint import INDEX, SINGLE
from mixtral_serve.model.config_file import CONFIG, GENERATION_CONFIG
from mixtral_serve.model.loader import DTYPES
from mixtral_serve.model.shape import BYTES_PER_ELEMENT, EMBEDDING, HEAD, ModelShape, Weights

MAX_SHARD_BYTES: Final = 2 << 30

DEMO_SIZED: Final = ModelShape(
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=128,
    num_layers=4,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_token=2,
    max_model_len=4096,
)
"""The dimensions of the bundled demo model."""


def write_synthetic_checkpoint(
    directory: Path,
    shape: ModelShape,
    *,
    seed: int = 0,
    weights: Weights = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a complete checkpoint (weights, config, tokenizer) into ``directory``, which is created.

    Weights that fit ``max_shard_bytes`` become one ``model.safetensors``; others are sharded, with an index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shape, weights, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _draw(name, shape, seed).to(DTYPES[weights]) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = {"total_size": shape.weights_bytes(weights)}
        _write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})
    _write_json(directory / CONFIG, hub_config(shape, weights))
    _write_json(directory / GENERATION_CONFIG, {"bos_token_id": shape.bos_token_id, "eos_token_id": _eos(shape)})
    _write_json(directory / "tokenizer.json", _tokenizer(shape.vocab_size))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())


def hub_config(shape: ModelShape, weights: Weights) -> dict[str, object]:
    """``config.json`` as Mixtral's stands on the Hub."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": _eos(shape),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_model_len,
        "model_type": "mixtral",
        "num_attention_heads": shape.num_query_heads,
        "num_experts_per_tok": shape.num_experts_per_token,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "num_local_experts": shape.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.sliding_window,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[weights],
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _eos(shape: ModelShape) -> int | list[int]:
    return shape.eos_token_ids[0] if len(shape.eos_token_ids) == 1 else list(shape.eos_token_ids)


def _shards(shape: ModelShape, weights: Weights, max_shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard, in order."""
    names: list[str] = []
    num_bytes = 0
    for name, dims in shape.hub_tensors().items():
        size = math.prod(dims) * BYTES_PER_ELEMENT[weights]
        if names and num_bytes + size > max_shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names


def _draw(name: str, shape: ModelShape, seed: int) -> torch.Tensor:
    """One tensor's values, fp32."""
    dims = shape.hub_tensors()[name]
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    noise = torch.randn(dims, generator=generator)
    if len(dims) == 1:
        return 1 + 0.1 * noise
    if name == EMBEDDING:
        # A tied head reads the same rows as logits: they must not be larger than a head's.
        return noise * (2 / math.sqrt(shape.hidden_size)) if shape.tied else noise
    gain = 2.0 if name == HEAD or name.endswith("gate.weight") else 1.0
    return noise * (gain / math.sqrt(dims[1]))


def _tokenizer(vocab_size: int) -> dict[str, object]:
    """A tokenizer that covers every id: control tokens, bytes, then made-up words, as far as ids reach."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"▁word{i}" for i in range(vocab_size - len(words))]
    vocabulary = {word: i for i, word in enumerate(words[:vocab_size])}
    control = [
        {
            "id": i,
            "content": words[i],
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in range(min(3, vocab_size))
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": control,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, object]:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": template,
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
