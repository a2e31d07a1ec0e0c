"""What the settings mean before anything is loaded: which checkpoint, which memory plan, which schedule.

Owns the demands of the memory plan: everything but the KV cache that will need memory, in both processes. The
figures are upper bounds; where one is an estimate it says so. The API process and the engine process compute
the same plan from the same settings.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.config_file import read_shape
from mixtral_serve.model.shape import BYTES_PER_ELEMENT, ModelShape
from mixtral_serve.settings import Settings
from scheduler.accountant import KVLayout, MemoryPlan, plan_memory, request_bytes
from scheduler.config import SchedulerConfig
from scheduler.errors import ConfigError

ENGINE_PROCESS_BYTES: Final = 700_000_000
"""Interpreter, PyTorch, Transformers and their allocators, measured at 450 to 600 MB."""
API_PROCESS_BYTES: Final = 300_000_000
"""Interpreter, web framework, tokenizer, metrics, measured at 90 to 200 MB."""
MOST_REQUESTS_BYTES: Final = 1_000_000_000
"""Budget for the structures of live requests; beyond it requests are refused, however few they are."""
SCORING_BYTES: Final = 4 * (32 << 20)
"""Logits of scored prompts are computed in pieces of 32 MB; a piece is held up to four times (softmax, sorting)."""

LEAST_WORKSPACE_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Everything that follows from the settings and the checkpoint's shape."""

    checkpoint: Path
    model_names: tuple[str, ...]
    shape: ModelShape
    max_model_len: int
    memory: MemoryPlan
    requests_budget_bytes: int


def plan_serving(settings: Settings) -> ServingPlan:
    """Read the checkpoint's configuration and divide the memory.

    Raises:
        CheckpointError: there is no usable checkpoint; the message names the file.
        PlanError: it does not fit under the cap; the message is a table.
        ConfigError: a setting contradicts the model; the message names it.
    """
    _refuse_open_door(settings)
    checkpoint = checkpoint_path() if settings.model == "demo" else Path(settings.model)
    shape = read_shape(checkpoint)
    max_model_len = settings.max_model_len or shape.max_model_len
    if max_model_len > shape.max_model_len:
        raise ConfigError("max_model_len", f"the model was made for {shape.max_model_len}, got {max_model_len}")
    worst_request = request_bytes(max_model_len, max_model_len, settings.block_size)
    num_live = settings.max_num_seqs + settings.max_num_queued_reqs
    requests_budget_bytes = min(MOST_REQUESTS_BYTES, num_live * worst_request)
    element_bytes = BYTES_PER_ELEMENT[settings.weights]
    layout = KVLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, element_bytes, settings.block_size)
    demands = {
        f"weights ({settings.weights})": shape.weights_bytes(settings.weights),
        "activations (estimate)": activation_bytes(shape, settings, layout),
        "live requests": requests_budget_bytes,
        "engine process": ENGINE_PROCESS_BYTES,
        "API process": API_PROCESS_BYTES,
    }
    # More blocks than all seats can fill would only be a larger prefix cache; whoever wants that asks for it.
    most_tokens = settings.max_num_seqs * max_model_len
    if settings.kv_cache_memory_bytes:
        most_tokens = settings.kv_cache_memory_bytes // layout.bytes_per_token
    return ServingPlan(
        checkpoint=checkpoint,
        model_names=settings.served_model_name or (_name_of(settings, checkpoint),),
        shape=shape,
        max_model_len=max_model_len,
        memory=plan_memory(
            settings.memory_cap_bytes, layout, demands, min_tokens=settings.block_size, max_tokens=most_tokens
        ),
        requests_budget_bytes=requests_budget_bytes,
    )


def activation_bytes(shape: ModelShape, settings: Settings, layout: KVLayout) -> int:
    """Estimate of one step's largest set of activations, in bytes.

    A row's hidden states, projections and inner expert activations, and the logits of all that sample, all
    counted as fp32; the workspace into which one layer's keys and values of one long request are gathered.
    """
    inner = 4 * shape.num_experts_per_token * shape.intermediate_size
    attention = 4 * shape.num_query_heads * shape.head_dim
    rows = settings.max_num_batched_tokens * (12 * shape.hidden_size + inner + attention)
    logits = 4 * settings.max_num_seqs * shape.vocab_size
    gathered_bytes = (shape.max_model_len + layout.block_size) * layout.bytes_per_token // layout.num_layers
    return 4 * (rows + logits) + max(gathered_bytes, LEAST_WORKSPACE_BYTES) + SCORING_BYTES


def scheduler_config(settings: Settings, plan: ServingPlan) -> SchedulerConfig:
    """The schedule's bounds.

    Raises:
        ConfigError: they contradict each other.
    """
    return SchedulerConfig(
        num_blocks=plan.memory.num_blocks,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        max_prefill_chunk=settings.long_prefill_token_threshold or None,
        max_waiting=settings.max_num_queued_reqs,
        enable_prefix_caching=settings.enable_prefix_caching,
        cache_seed=secrets.token_bytes(16),
    )


def _refuse_open_door(settings: Settings) -> None:
    """Without keys the server answers everybody who reaches it; beyond loopback that must be asked for."""
    try:
        is_loopback = ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = settings.host == "localhost"
    if not is_loopback and not settings.insecure_no_auth:
        raise ConfigError("host", f"{settings.host} can be reached from other machines; that takes insecure_no_auth")


def _name_of(settings: Settings, checkpoint: Path) -> str:
    return "mixtral-demo" if settings.model == "demo" else checkpoint.resolve().name
