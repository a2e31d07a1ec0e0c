"""``mixtral-serve plan``: what a model needs and what the rest of the memory buys, without loading anything.

Owns the command's output, for people and as JSON. It judges against the cap alone, so that an answer given on a laptop
holds for the server it is meant for; what this machine would say is one line, and a warning at most. ``serve`` judges
against the cap, the cgroups and the machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mixtral_serve.compose.known_models import KNOWN_MODELS, known_shape
from mixtral_serve.compose.limits import Limit, tightest_limit
from mixtral_serve.compose.memory import demands_of, kv_layout
from mixtral_serve.compose.plan import ServingPlan, checkpoint_of, plan_shape, settle_weights
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.model.config_file import read_shape
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.shape import ModelShape, kv_dtype_for
from mixtral_serve.settings import Settings
from scheduler.errors import ConfigError, PlanError

LENGTHS: Final = (1024, 4096, 32_768)
"""Requests (prompt and output together) for which it says how many fit at once."""
_NO_CAP: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What the command says."""

    text: str
    values: dict[str, object]
    """The same for machines; sizes in bytes."""
    exit_code: int
    """0, or 78 for what does not fit or is not sound."""

    def rendered(self, *, as_json: bool) -> str:
        """The output, with a newline at its end."""
        return json.dumps(self.values, indent=2) + "\n" if as_json else self.text + "\n"


def make_plan(settings: Settings, *, machine_limit: Limit | None = None) -> PlanReport:
    """Plan for the model that ``settings`` name: a directory, ``demo``, or a published Mixtral.

    ``machine_limit`` is what this machine allows; None: look.
    """
    try:
        settings, shape, checkpoint = _model(settings)
        plan = plan_shape(settings, shape, checkpoint)
    except PlanError as error:
        return _too_large(settings, shape, str(error))
    except (CheckpointError, ConfigError) as error:
        return PlanReport(f"{settings.model}: {error}", {"fits": False, "error": str(error)}, EXIT_CONFIG)
    return _fitting(settings, plan, machine_limit or tightest_limit(_NO_CAP))


def _model(settings: Settings) -> tuple[Settings, ModelShape, Path]:
    """The settings as this model takes them, its shape, and its directory."""
    checkpoint = checkpoint_of(settings)
    published = None if checkpoint.is_dir() else known_shape(settings.model)
    if published is not None:
        return settings, published, checkpoint
    if not checkpoint.is_dir():
        names = ", ".join(KNOWN_MODELS)
        raise ConfigError("model", f"there is no directory {settings.model}; known by name are demo, {names}")
    return settle_weights(settings, checkpoint), read_shape(checkpoint), checkpoint


def _fitting(settings: Settings, plan: ServingPlan, machine_limit: Limit) -> PlanReport:
    memory = plan.memory
    counts = {length: memory.num_requests_of(length) for length in LENGTHS if length <= plan.max_model_len}
    room = ", ".join(f"{count:,} of {length:,} tokens" for length, count in counts.items())
    fits_here = memory.planned_bytes <= machine_limit.num_bytes
    lines = [
        _head(settings, plan.shape),
        memory.table(),
        f"  The KV cache holds {memory.num_kv_tokens:,} tokens of {memory.layout.bytes_per_token:,} bytes:",
        f"  at once {room} (and at most {settings.max_num_seqs} run: max_num_seqs)",
        f"  {'ok' if fits_here else 'WARNING'}: {machine_limit.name}: {machine_limit.num_bytes / 1e9:.3f} GB"
        + ("" if fits_here else ", less than planned: serve would plan with that, or refuse"),
    ]
    values = _values(settings, plan.shape) | {
        "fits": True,
        "planned_bytes": memory.planned_bytes,
        "parts": {**asdict(plan.demands), "kv_cache": memory.kv_cache_bytes},
        "num_kv_tokens": memory.num_kv_tokens,
        "num_requests_at_once": {str(length): count for length, count in counts.items()},
        "max_num_seqs": settings.max_num_seqs,
        "machine": {"name": machine_limit.name, "limit_bytes": machine_limit.num_bytes, "fits": fits_here},
    }
    return PlanReport("\n".join(lines), values, 0)


def _too_large(settings: Settings, shape: ModelShape, table: str) -> PlanReport:
    demands = demands_of(
        settings,
        shape,
        max_model_len=settings.max_model_len or shape.max_model_len,
        cap_bytes=settings.memory_cap_bytes,
    )
    values = _values(settings, shape) | {"fits": False, "parts": asdict(demands)}
    return PlanReport(f"{_head(settings, shape)}\n{table}", values, EXIT_CONFIG)


def _head(settings: Settings, shape: ModelShape) -> str:
    kv_dtype = kv_dtype_for(settings.held_weights, settings.kv_cache_dtype)
    return (
        f"{settings.model}: {shape.num_parameters:,} parameters, weights in {settings.held_weights}, "
        f"keys and values in {kv_dtype}"
    )


def _values(settings: Settings, shape: ModelShape) -> dict[str, object]:
    return {
        "model": settings.model,
        "num_parameters": shape.num_parameters,
        "weights": settings.held_weights,
        "kv_cache_dtype": kv_dtype_for(settings.held_weights, settings.kv_cache_dtype),
        "kv_bytes_per_token": kv_layout(shape, settings).bytes_per_token,
        "cap_bytes": settings.memory_cap_bytes,
    }
