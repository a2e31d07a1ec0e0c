"""What was found, for programs: plain values that become JSON.

Owns: ``figures``. Seconds, bytes and counts; every figure of the tables is here, beside the machine and the versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime

import torch
import transformers

from bench.full_size.allowance import Allowance
from bench.full_size.capacity import LIMIT_S
from bench.full_size.extrapolation import RULE
from bench.full_size.measurement import Findings
from bench.measure import Machine
from mixtral_serve import __version__


def figures(found: Findings, allowance: Allowance, parameters: Mapping[str, object]) -> dict[str, object]:
    """The JSON."""
    engine = found.engine
    plan = engine.plan
    memory = plan.serving.memory
    return {
        "model": plan.settings.model,
        "layers": plan.shape.num_layers,
        "full_layers": plan.full_shape.num_layers,
        "weights": plan.kind,
        "backend": engine.backend,
        "fingerprint": engine.runner.info.fingerprint,
        "threads": engine.num_threads,
        "read_bytes_per_s": engine.read_bytes_per_s,
        "filled_s": engine.filled_s,
        "memory": {
            "cap_bytes": plan.settings.memory_cap_bytes,
            "limit_bytes": memory.cap_bytes,
            "limit": memory.cap_name,
            "demands_bytes": dict(memory.demands),
            "kv_cache_bytes": memory.kv_cache_bytes,
            "kv_tokens": memory.num_kv_tokens,
            "planned_bytes": memory.planned_bytes,
            "planned_for_this_process_bytes": plan.serving.engine_bytes,
            "measured": None if found.memory is None else asdict(found.memory),
        },
        "grid": [_point(found, index) for index in range(len(found.grid.measured))],
        "cost_model": _cost_model(found),
        "bursts": [asdict(one) for one in found.bursts.bursts],
        "limit_p95_s": LIMIT_S,
        "capacities": {kind: asdict(one) for kind, one in found.capacities.items()},
        "confirmation": None if found.confirmation is None else asdict(found.confirmation),
        "whole_model": {"rule": RULE, "machines": [asdict(one) for one in found.expected]},
        "not_measured": found.cut,
        "spent_s": dict(allowance.spent_s),
        "total_s": allowance.used_s,
        "parameters": dict(parameters),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(Machine.this()),
        "versions": {
            "mixtral_serve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _point(found: Findings, index: int) -> dict[str, object]:
    one = found.grid.measured[index]
    return {
        "name": str(one.point),
        **asdict(one),
        "work": one.work._asdict(),
        "per_layer_s": one.median_s / found.engine.plan.shape.num_layers,
        "model_s": None if found.costs is None else found.costs.model.seconds(one.work),
    }


def _cost_model(found: Findings) -> dict[str, object] | None:
    if found.costs is None or found.fit_error is None:
        return None
    return {
        **asdict(found.costs.model),
        "outside_runner_s": found.costs.outside_runner_s,
        "error": asdict(found.fit_error),
        "expert_shares": found.costs.popularity.shares,
    }
