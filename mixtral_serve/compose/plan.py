"""What the settings mean before anything is loaded: which checkpoint, which memory plan, which schedule.

Owns: ``ServingPlan``. The API process and the engine process compute the same plan from the same settings: what
the machine allows is found out once, by the first of them, and handed on as the cap. Imports no tensor library.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from msgspec.structs import replace

from mixtral_serve.compose.limits import Limit
from mixtral_serve.compose.memory import Demands, demands_of, kv_layout, most_kv_tokens
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.config_file import read_shape
from mixtral_serve.model.manifest import verified_manifest
from mixtral_serve.model.shape import ModelShape, Weights
from mixtral_serve.settings import Settings
from scheduler.accountant import MemoryPlan, plan_memory
from scheduler.config import SchedulerConfig
from scheduler.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Everything that follows from the settings and the checkpoint's shape."""

    checkpoint: Path
    model_names: tuple[str, ...]
    shape: ModelShape
    weights: Weights
    max_model_len: int
    memory: MemoryPlan
    demands: Demands

    @property
    def requests_budget_bytes(self) -> int:
        """What the accountant may promise to live requests."""
        return self.demands.live_requests

    @property
    def processes_bytes(self) -> int:
        """What both processes together may hold: the plan without the kernel's part."""
        return self.memory.planned_bytes - self.demands.page_tables

    @property
    def engine_bytes(self) -> int:
        """What the engine process may hold. The budget of live requests counts on either side."""
        return self.processes_bytes - self.demands.api_process


def plan_serving(settings: Settings, limit: Limit | None = None) -> ServingPlan:
    """Read the checkpoint's configuration and divide the memory: the cap, or ``limit`` where that is given.

    Raises:
        CheckpointError: there is no usable checkpoint; the message names the file.
        PlanError: it does not fit under the cap; the message is a table.
        ConfigError: a setting contradicts the model; the message names it.
    """
    _refuse_open_door(settings)
    checkpoint = checkpoint_of(settings)
    return plan_shape(settle_weights(settings, checkpoint), read_shape(checkpoint), checkpoint, limit)


def checkpoint_of(settings: Settings) -> Path:
    """The directory that the settings name; it need not exist."""
    return checkpoint_path() if settings.model == "demo" else Path(settings.model)


def plan_shape(settings: Settings, shape: ModelShape, checkpoint: Path, limit: Limit | None = None) -> ServingPlan:
    """The plan for a model of this shape. Raises as ``plan_serving``, less ``CheckpointError``."""
    _refuse_idle_kernels(settings)
    max_model_len = settings.max_model_len or shape.max_model_len
    if max_model_len > shape.max_model_len:
        raise ConfigError("max_model_len", f"the model was made for {shape.max_model_len}, got {max_model_len}")
    limit = limit or Limit("cap", settings.memory_cap_bytes)
    layout = kv_layout(shape, settings)
    demands = demands_of(settings, shape, max_model_len=max_model_len, cap_bytes=limit.num_bytes)
    return ServingPlan(
        checkpoint=checkpoint,
        model_names=settings.served_model_name or (_name_of(settings, checkpoint),),
        shape=shape,
        weights=settings.held_weights,
        max_model_len=max_model_len,
        memory=plan_memory(
            limit.num_bytes,
            layout,
            demands.named(settings.held_weights),
            min_tokens=settings.block_size,
            max_tokens=most_kv_tokens(settings, layout, max_model_len),
            cap_name=limit.name,
        ),
        demands=demands,
    )


def settle_weights(settings: Settings, checkpoint: Path) -> Settings:
    """The settings with the packing of a packed checkpoint, which is the only one it can be served in.

    Raises:
        CheckpointError: the checkpoint's manifest is not sound.
        ConfigError: the settings ask for another packing.
    """
    manifest = verified_manifest(checkpoint)
    if manifest is None or settings.weights == manifest.weights:
        return settings
    if settings.weights != "auto":
        problem = f"{settings.weights} contradicts the checkpoint, which is packed as {manifest.weights}"
        raise ConfigError("weights", f"{problem}; leave the setting out")
    return replace(settings, weights=manifest.weights)


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


def _refuse_idle_kernels(settings: Settings) -> None:
    """What was asked for by name must be what computes."""
    weights = settings.held_weights
    if weights not in ("int8", "int4") and settings.kernels in ("native", "reference"):
        problem = f"{settings.kernels} computes with int8 and int4 weights; {weights} weights are PyTorch's own"
        raise ConfigError("kernels", problem)
    if weights == "bf16" and settings.kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype", "int8 goes with activations in fp32; beside bf16 weights they are bf16")


def _name_of(settings: Settings, checkpoint: Path) -> str:
    return "mixtral-demo" if settings.model == "demo" else checkpoint.resolve().name
