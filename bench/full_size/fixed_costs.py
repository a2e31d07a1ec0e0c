"""What a step and a layer cost whatever they compute: the same code on a model that is too narrow to matter.

Owns: ``measure_fixed_costs``. Two models that differ in their number of layers only; one decode at a short context. The
difference is the layers', the rest is the step's: laying out the row, sampling from a small vocabulary, results.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Final

from msgspec.structs import replace as changed

from bench.full_size.cost_model import FixedCosts
from bench.full_size.engine import build_engine, plan_engine
from bench.full_size.points import SHORT, Blocks, Point, batch_of
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.settings import Settings

_FEW: Final = 2
_MANY: Final = 12
_RUNS: Final = 40
_POINT: Final = Point(1, SHORT)


def measure_fixed_costs(settings: Settings, shape: ModelShape, backend: BackendName) -> FixedCosts:
    """For models of the layout of ``shape``, computed with by ``backend``; takes about a second."""
    narrow = replace(
        shape,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_layers=_MANY,
    )
    settings = changed(settings, kernels=backend, kv_cache_memory_bytes=16 << 20)
    few_s, many_s = (_step_s(settings, narrow, num_layers) for num_layers in (_FEW, _MANY))
    layer_s = max(0.0, (many_s - few_s) / (_MANY - _FEW))
    return FixedCosts(step_s=max(0.0, few_s - _FEW * layer_s), layer_s=layer_s)


def _step_s(settings: Settings, narrow: ModelShape, num_layers: int) -> float:
    """Median of one decode step."""
    engine = build_engine(plan_engine(settings, narrow, num_layers))
    config = engine.plan.config
    batch = batch_of(_POINT, Blocks(config.num_blocks, config.block_size), vocab_size=narrow.vocab_size)
    runs_s = []
    for _ in range(_RUNS):
        began_s = time.perf_counter()
        engine.runner.run(batch)
        runs_s.append(time.perf_counter() - began_s)
    return median(runs_s[_RUNS // 4 :])
