"""Checkpoint -> a ``MixtralForCausalLM`` that holds its weights and runs our attention and experts.

Owns: the way of a weight from the file to its place. The model is built empty (accelerate), its storage is allocated
once, and each tensor of each shard goes to its place, cast or quantised on the way: peak memory is the finished model
plus two tensors. Transformers keeps one layer's experts in two fused parameters where the Hub has three matrices per
expert; a place is therefore a view into a parameter, and ``places`` is the one function that knows both layouts. For
packed weights ``quantized`` has replaced modules and offers places of its own; a checkpoint that is packed already is
read straight into them (``packed_loader``).

Invariants: when ``load_model`` returns, every place was written exactly once, and no shard was ever mapped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from transformers import MixtralConfig, MixtralForCausalLM

from mixtral_serve.kernels.backend import Backend
from mixtral_serve.kernels.formats import Kind, NotFiniteError, PackedMatrix
from mixtral_serve.kernels.quantizer import quantize_into
from mixtral_serve.model.attention import ATTENTION, register_attention
from mixtral_serve.model.checkpoint import Checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.experts import EXPERTS, register_experts
from mixtral_serve.model.manifest import MANIFEST
from mixtral_serve.model.native_layers import hand_over
from mixtral_serve.model.packed_layout import packed_files
from mixtral_serve.model.packed_loader import load_packed
from mixtral_serve.model.progress import progress
from mixtral_serve.model.quantized import hold_packed, packed_places
from mixtral_serve.model.rowwise import make_row_invariant
from mixtral_serve.model.shape import ModelShape, Weights
from mixtral_serve.model.shard_reader import shard_tensors

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


def load_model(checkpoint: Checkpoint, weights: Weights, backend: Backend | None = None) -> MixtralForCausalLM:
    """Read every weight of ``checkpoint``; the model is in eval mode and its parameters need no gradient.

    Args:
        checkpoint: as ``open_checkpoint`` returns it.
        weights: how they are held; a checkpoint that is not packed is quantised tensor by tensor.
        backend: what computes with packed weights; None for all others.

    Raises:
        CheckpointError: a shard changed or broke since it was checked, or holds what cannot be quantised.
    """
    started_s = time.monotonic()
    if checkpoint.manifest is not None and checkpoint.manifest.weights != weights:
        packed = checkpoint.manifest.weights
        raise CheckpointError(MANIFEST, f"is that of {packed} weights: weights must be {packed}, not {weights}")
    model = build_empty(checkpoint.shape)
    if weights == "int8" or weights == "int4":
        assert backend is not None, "packed weights are computed with by a backend"
        hold_packed(model, weights)
        if backend.is_row_invariant:
            make_row_invariant(model)
        if checkpoint.manifest is not None:
            load_packed(checkpoint, packed_places(model), num_threads=torch.get_num_threads())
        else:
            _quantize_shards(checkpoint, model, weights)
        hand_over(model, backend)
    else:
        _allocate(model, DTYPES[weights])
        targets = dict(places(model))
        _read_shards(checkpoint, lambda name, tensor: targets.pop(name).copy_(tensor))
        assert not targets, f"never written: {sorted(targets)}"
    _log.info("loaded %s as %s in %.1f s", checkpoint.path.name, weights, time.monotonic() - started_s)
    return model


def _read_shards(checkpoint: Checkpoint, put: Callable[[str, torch.Tensor], object]) -> None:
    """Hand every tensor to ``put``, under its name on the Hub; it is gone when ``put`` returns."""
    label = f"loading {checkpoint.path.name}"
    with torch.no_grad(), progress(label, total=checkpoint.num_tensors, unit="tensors") as report:
        for shard in checkpoint.shards:
            for name, tensor in shard_tensors(shard):
                try:
                    put(name, tensor)
                except NotFiniteError as error:
                    raise CheckpointError(shard.path.name, str(error), subject=name) from None
                report.advance(1)


def _quantize_shards(checkpoint: Checkpoint, model: MixtralForCausalLM, kind: Kind) -> None:
    """Fill the places of packed weights from tensors in floating point, each quantised where it lies."""
    storage = dict(packed_places(model))
    targets: dict[str, list[PackedMatrix | torch.Tensor]] = {}
    for file in packed_files(checkpoint.shape, kind):
        for spec in file.plain:
            place = storage[spec.name]
            assert isinstance(place, torch.Tensor)
            targets.setdefault(spec.name, []).append(place)
        for matrix in file.matrices:
            place = storage[matrix.name]
            assert isinstance(place, PackedMatrix)
            for expert in range(matrix.num_experts or 1):
                one = place if matrix.num_experts is None else place[expert]
                targets.setdefault(matrix.source_name(expert), []).append(one)

    def put(name: str, tensor: torch.Tensor) -> None:
        for target in targets.pop(name):  # a tied head is made of the embedding as well
            if isinstance(target, PackedMatrix):
                quantize_into(tensor, target)
            else:
                target.copy_(tensor)

    _read_shards(checkpoint, put)
    assert not targets, f"never written: {sorted(targets)}"


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
