"""Checkpoint -> a ``MixtralForCausalLM`` that holds its weights and runs our attention and experts.

Owns: the way of a weight from the file to its place. The model is built empty (accelerate), its parameters are
allocated once in the wanted dtype, and each tensor of each shard is copied, cast on the way, into its place:
peak memory is the finished model plus one tensor. Transformers keeps one layer's experts in two fused
parameters where the Hub has three matrices per expert; a place is therefore a view into a parameter, and
``places`` is the one function that knows both layouts. Other weight formats come in here: they replace modules
of the empty model and offer their own places.

Invariants: when ``load_model`` returns, every parameter was written exactly once and no shard is mapped any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral_serve.model.attention import ATTENTION, register_attention
from mixtral_serve.model.checkpoint import Checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.experts import EXPERTS, register_experts
from mixtral_serve.model.progress import progress
from mixtral_serve.model.shape import ModelShape, Weights

_log = logging.getLogger(__name__)

DTYPES: Final[dict[Weights, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def hf_config(shape: ModelShape, *, attention: str = ATTENTION, experts: str = EXPERTS) -> MixtralConfig:
    """Transformers' config for a shape; ``attention`` and ``experts`` name implementations in its registries."""
    # Named this way because Transformers' class does not declare the two in its signature.
    implementations: dict[str, Any] = {"attn_implementation": attention, "experts_implementation": experts}
    return MixtralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_query_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_model_len,
        rms_norm_eps=shape.rms_norm_eps,
        bos_token_id=shape.bos_token_id,
        eos_token_id=list(shape.eos_token_ids),
        tie_word_embeddings=shape.tied,
        sliding_window=shape.sliding_window,
        num_experts_per_tok=shape.num_experts_per_token,
        num_local_experts=shape.num_experts,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        **implementations,
    )


def load_model(checkpoint: Checkpoint, weights: Weights) -> MixtralForCausalLM:
    """Read every weight of ``checkpoint``; the model is in eval mode and its parameters need no gradient.

    Raises:
        CheckpointError: a shard changed or broke since it was checked.
    """
    started_s = time.monotonic()
    model = build_empty(checkpoint.shape)
    _allocate(model, DTYPES[weights])
    targets = dict(places(model))
    label = f"loading {checkpoint.path.name}"
    with torch.no_grad(), progress(label, total=checkpoint.num_tensors, unit="tensors") as report:
        for shard in checkpoint.shards:
            try:
                with safe_open(shard.path, framework="pt") as tensors:
                    for name in shard.tensors:
                        targets.pop(name).copy_(tensors.get_tensor(name))
                        report.advance(1)
            except (SafetensorError, OSError, RuntimeError) as error:
                raise CheckpointError(shard.path.name, f"cannot be read ({error})") from None
    assert not targets, f"never written: {sorted(targets)}"
    _log.info("loaded %s as %s in %.1f s", checkpoint.path.name, weights, time.monotonic() - started_s)
    return model


def build_empty(shape: ModelShape) -> MixtralForCausalLM:
    """The model without storage for its parameters; rotary frequencies are computed."""
    register_attention()
    register_experts()
    with init_empty_weights():
        model: MixtralForCausalLM = MixtralForCausalLM(hf_config(shape))
    chosen = model.config._attn_implementation, model.config._experts_implementation
    assert chosen == (ATTENTION, EXPERTS), f"Transformers replaced our implementations by {chosen}"
    model.requires_grad_(False)
    model.train(False)
    return model


def places(model: MixtralForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Hub name -> the view of a parameter that the tensor of this name is copied into."""
    for name, parameter in model.named_parameters():
        hub = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(".experts.gate_up_proj"):
            prefix, inner = hub.removesuffix(".gate_up_proj"), parameter.shape[1] // 2
            for expert in range(parameter.shape[0]):
                yield f"{prefix}.{expert}.w1.weight", parameter.data[expert, :inner]
                yield f"{prefix}.{expert}.w3.weight", parameter.data[expert, inner:]
        elif name.endswith(".experts.down_proj"):
            prefix = hub.removesuffix(".down_proj")
            for expert in range(parameter.shape[0]):
                yield f"{prefix}.{expert}.w2.weight", parameter.data[expert]
        else:
            yield hub, parameter.data


def _allocate(model: MixtralForCausalLM, dtype: torch.dtype) -> None:
    """Give every empty parameter storage, and tie the head where the config says so."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            storage = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(storage, requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
