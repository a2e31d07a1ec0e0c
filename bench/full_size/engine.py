"""The real engine around synthetic weights: planned under the cap, allocated, filled, and ready to run.

Owns: ``plan_engine``, which allocates nothing, and ``build_engine``. The parts are put together as the server does it;
only the checkpoint is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

import torch
from msgspec.structs import replace as changed

from bench.full_size.allowance import NoTimeError
from bench.full_size.serving import GoOn, OnStep, Served, Timepiece, Wanted, serve
from bench.full_size.synthetic import fill_synthetic
from mixtral_serve import machine
from mixtral_serve.compose.limits import Limit, tightest_limit
from mixtral_serve.compose.memory import kv_layout
from mixtral_serve.compose.plan import ServingPlan, plan_shape, scheduler_config
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.kernels.formats import Kind
from mixtral_serve.kernels.names import BackendName
from mixtral_serve.kernels.registry import choose
from mixtral_serve.kernels.self_test import settle_isa
from mixtral_serve.model.loader import build_empty
from mixtral_serve.model.native_layers import hand_over
from mixtral_serve.model.quantized import hold_packed, packed_places
from mixtral_serve.model.rowwise import make_row_invariant
from mixtral_serve.model.runner import LoadedModel, MixtralRunner, Numerics, assemble_runner
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.settings import Settings
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.accountant import DEFAULT_CAP_BYTES, MemoryAccountant
from scheduler.config import SchedulerConfig
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler

GRID_KV_TOKENS: Final = 64 * (4096 + 16)
"""What the largest point of the grid needs."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What is to be built."""

    settings: Settings
    kind: Kind
    full_shape: ModelShape
    """The published model."""
    serving: ServingPlan
    """Of as many of its layers as are run."""
    config: SchedulerConfig

    @property
    def shape(self) -> ModelShape:
        """What is run."""
        return self.serving.shape

    @property
    def is_whole(self) -> bool:
        """Whether all layers are run."""
        return self.shape.num_layers == self.full_shape.num_layers

    def of_full_model(self) -> SchedulerConfig:
        """The schedule of the whole model under the cap; a lower one was meant for fewer layers.

        Raises:
            PlanError: it does not fit there.
        """
        limit = Limit("cap", max(self.settings.memory_cap_bytes, DEFAULT_CAP_BYTES))
        settings = changed(self.settings, kv_cache_memory_bytes=0)
        return scheduler_config(settings, plan_shape(settings, self.full_shape, Path(self.settings.model), limit))


def plan_engine(settings: Settings, full_shape: ModelShape, num_layers: int) -> EnginePlan:
    """The memory plan and the schedule of ``num_layers`` layers of ``full_shape``.

    Under a cap, a cgroup and a machine the tightest binds, and here also what nobody else uses at the moment. With
    fewer layers than the model's the KV cache is not made larger than the grid needs.

    Raises:
        PlanError: it does not fit; the message is a table.
        ConfigError: a setting contradicts the model or another one; the message names it.
    """
    kind = settings.held_weights
    assert kind == "int4" or kind == "int8", "weights are packed"
    shape = replace(full_shape, num_layers=num_layers)
    if num_layers < full_shape.num_layers and not settings.kv_cache_memory_bytes:
        needed = GRID_KV_TOKENS * kv_layout(shape, settings).bytes_per_token
        settings = changed(settings, kv_cache_memory_bytes=needed)
    limit = tightest_limit(settings.memory_cap_bytes)
    memory = machine.machine_memory()
    if memory is not None and memory.available_bytes < limit.num_bytes:
        limit = Limit("memory that is available now", memory.available_bytes)
    serving = plan_shape(settings, shape, Path(settings.model), limit)
    return EnginePlan(settings, kind, full_shape, serving, scheduler_config(settings, serving))


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """A model in memory, and the engine around it."""

    plan: EnginePlan
    model: torch.nn.Module
    """For those who listen at its modules."""
    runner: MixtralRunner
    table: TokenBytes
    backend: BackendName
    num_threads: int
    filled_s: float
    """Seconds that the weights took."""
    read_bytes_per_s: float
    """What a plain read of packed weights gets."""

    def run(
        self,
        wanted: Sequence[Wanted],
        *,
        primed: Wanted | None = None,
        go_on: GoOn = lambda _: True,
        on_step: OnStep = lambda _: None,
    ) -> list[Served]:
        """Serve ``wanted`` on the real clock, by a scheduler that has seen ``primed`` before, and nothing else."""
        accountant = MemoryAccountant(self.plan.serving.requests_budget_bytes)
        scheduler = Scheduler(self.plan.config, POLICIES[self.plan.settings.scheduling_policy](), accountant=accountant)
        core = EngineCore(scheduler, self.runner, self.table)
        clock = Timepiece(time.monotonic, _sleep_until)
        if primed is not None:
            serve(core, [primed], clock, go_on=go_on, on_step=on_step)
        return serve(core, wanted, clock, go_on=go_on, on_step=on_step)


def build_engine(plan: EnginePlan, *, go_on: Callable[[], bool] = lambda: True) -> LoadedEngine:
    """Allocate and fill the weights, then the KV cache.

    Raises:
        KernelsUnavailableError, NativeUnavailableError: nothing here computes with such weights, keys and values.
        NoTimeError: ``go_on`` said no before the weights were there.
    """
    settings, shape, kind = plan.settings, plan.shape, plan.kind
    settle_isa()
    backend = choose(kind, settings.kernels, dims=(shape.intermediate_size, shape.hidden_size))
    model = build_empty(shape)
    began_s = time.monotonic()
    hold_packed(model, kind)
    if backend.is_row_invariant:
        make_row_invariant(model)
    if not fill_synthetic(packed_places(model), go_on=go_on):
        raise NoTimeError
    filled_s = time.monotonic() - began_s
    read_bytes_per_s = _read_rate(model.model.layers[0].mlp.experts.weights["w1"].quants)
    hand_over(model, backend)
    numerics = Numerics(weights=kind, kernels=settings.kernels, kv_cache_dtype=settings.kv_cache_dtype)
    runner = assemble_runner(
        LoadedModel(model, shape, numerics, backend),
        num_blocks=plan.config.num_blocks,
        block_size=settings.block_size,
        name=settings.model,
    )
    return LoadedEngine(
        plan=plan,
        model=model,
        runner=runner,
        table=made_up_words(shape.vocab_size),
        backend=cast(BackendName, backend.name),
        num_threads=torch.get_num_threads(),
        filled_s=filled_s,
        read_bytes_per_s=read_bytes_per_s,
    )


def made_up_words(vocab_size: int) -> TokenBytes:
    """A vocabulary for a model that has no tokenizer."""
    return TokenBytes({token_id: b" word%d" % token_id for token_id in range(vocab_size)}, special_ids=(0, 1, 2))


def _read_rate(packed: torch.Tensor) -> float:
    """Bytes per second of the fastest of several plain reads, on all threads."""
    whole = packed.view(-1).view(torch.int64)
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        whole.sum()
        took_s.append(time.perf_counter() - began_s)
    return packed.nbytes / min(took_s)


def _sleep_until(time_s: float) -> None:
    time.sleep(max(0.0, time_s - time.monotonic()))
