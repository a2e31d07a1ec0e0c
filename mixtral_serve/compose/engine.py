"""Builds and runs the engine process: ``python -m mixtral_serve.compose.engine --settings JSON --fd N``.

Started by the API process, never by people. The settings arrive resolved, so that both processes mean the same
by them.

The process lives under a limit of its own from the start: while it loads, its share of the plan and the size of one
shard, for tensors on their way and what a backend makes of them; afterwards its share alone. An allocation beyond
that is an exception.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys

from mixtral_serve import settings as settings_module
from mixtral_serve.compose.plan import ServingPlan, plan_serving, scheduler_config
from mixtral_serve.engine.errors import EXIT_CONFIG, EngineStartError
from mixtral_serve.engine.memory import MemoryWatch, Watermarks, limit_data, settle_heap
from mixtral_serve.engine.process import EngineParts, run_engine
from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.kernels.registry import KernelsUnavailableError
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.runner import Numerics, load_runner
from mixtral_serve.observe.logs import configure_logging
from mixtral_serve.settings import Settings
from mixtral_serve.text.errors import TokenizerError
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.accountant import MemoryAccountant
from scheduler.invariants import CheckedScheduler
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


def build_engine(settings: Settings) -> EngineParts:
    """Load the model and put the engine together.

    Raises:
        EngineStartError: the checkpoint cannot be served as configured.
        ConfigError, PlanError: the settings contradict the model or the cap.
    """
    try:
        plan = plan_serving(settings)
        token_bytes = load_tokenizer(plan.checkpoint).token_bytes
        runner = load_runner(
            plan.checkpoint,
            Numerics(weights=plan.weights, kernels=settings.kernels, kv_cache_dtype=settings.kv_cache_dtype),
            num_blocks=plan.memory.num_blocks,
            block_size=settings.block_size,
            num_threads=settings.threads,
            name=plan.model_names[0],
        )
    except (CheckpointError, TokenizerError) as error:
        raise EngineStartError(f"{settings.model}: {error}", EXIT_CONFIG) from error
    except (KernelsUnavailableError, NativeUnavailableError) as error:
        raise EngineStartError(str(error), EXIT_CONFIG) from error
    return EngineParts(runner, build_scheduler(settings, plan), token_bytes)


def build_limited_engine(settings: Settings) -> EngineParts:
    """The engine, in a process that keeps to its share of the memory plan. Raises as ``build_engine``.

    For a process of its own: the limit is the process's.
    """
    try:
        plan = plan_serving(settings)
        largest_shard = max((file.stat().st_size for file in plan.checkpoint.glob("*.safetensors")), default=0)
    except (CheckpointError, OSError) as error:
        raise EngineStartError(f"{settings.model}: {error}", EXIT_CONFIG) from error
    limit_data(plan.engine_bytes + largest_shard)
    parts = build_engine(settings)
    settle_heap()
    limit_bytes = limit_data(plan.engine_bytes)
    _log.info("this process may hold %.3f GB", limit_bytes / 1e9)
    return parts._replace(memory=MemoryWatch(Watermarks.below(limit_bytes, plan.demands.allocator_slack)))


def build_scheduler(settings: Settings, plan: ServingPlan) -> Scheduler:
    """The scheduler that the settings describe."""
    kind = CheckedScheduler if settings.check_invariants else Scheduler
    return kind(
        scheduler_config(settings, plan),
        POLICIES[settings.scheduling_policy](),
        accountant=MemoryAccountant(plan.requests_budget_bytes),
    )


def main() -> int:
    """Entry point of the process. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="mixtral-serve engine")
    parser.add_argument("--settings", required=True, help="resolved settings as JSON")
    parser.add_argument("--fd", required=True, type=int, help="inherited socket to the API process")
    arguments = parser.parse_args()
    settings = settings_module.from_json(arguments.settings)
    configure_logging(level=settings.log_level.upper(), style=settings.log_format)
    return run_engine(socket.socket(fileno=arguments.fd), lambda: build_limited_engine(settings))


if __name__ == "__main__":
    sys.exit(main())
