"""Writing the checkpoint exactly as Mixtral-8x7B is stored on the Hugging Face Hub.

Owns the mapping from the fused expert weights Transformers keeps in memory to
one tensor per expert and projection, and the two configuration files.
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

CONTEXT_LENGTH: Final = 4096


def demo_config(vocab_size: int) -> MixtralConfig:
    """The shape of the demo model: 4 layers of 8 experts, every width a multiple of 64."""
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        tie_word_embeddings=False,
        router_aux_loss_coef=0.01,
    )


def hub_config(config: MixtralConfig) -> dict[str, Any]:
    """``config.json`` with the keys of the published Mixtral checkpoints."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "mixtral",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def hub_tensors(model: MixtralForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in bfloat16 under their published names."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        stem = name.replace(".mlp.", ".block_sparse_moe.").removesuffix(".gate_up_proj").removesuffix(".down_proj")
        if name.endswith(".gate_up_proj"):
            for expert, both in enumerate(weight):
                gate, up = both.chunk(2)
                tensors[f"{stem}.{expert}.w1.weight"] = gate
                tensors[f"{stem}.{expert}.w3.weight"] = up
        elif name.endswith(".down_proj"):
            for expert, down in enumerate(weight):
                tensors[f"{stem}.{expert}.w2.weight"] = down
        else:
            tensors[stem] = weight
    return {name: tensor.detach().to(torch.bfloat16).clone().contiguous() for name, tensor in tensors.items()}


def save_model(model: MixtralForCausalLM, directory: Path) -> None:
    """Write weights and configuration; the weights appear in one rename."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "model.safetensors.partial"
    save_file(hub_tensors(model), partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0"}
    for name, content in (("config.json", hub_config(model.config)), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def load_model(directory: Path) -> MixtralForCausalLM:
    """Load a checkpoint for computation in float32."""
    return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32)
