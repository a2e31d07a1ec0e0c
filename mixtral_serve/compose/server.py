"""Builds and runs the API process, which in turn starts the engine process.

Everything that can be refused is refused before the engine is started and before the port is opened: a plan
over the cap, a checkpoint without tokenizer, an address that is taken.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from dataclasses import asdict
from typing import Final, NamedTuple

from msgspec.structs import replace

from mixtral_serve import __version__
from mixtral_serve.api.app import create_app
from mixtral_serve.api.deps import ApiSettings, Dependencies
from mixtral_serve.api.server import ServerSettings, bind, serve
from mixtral_serve.compose.limits import tightest_limit
from mixtral_serve.compose.plan import ServingPlan, plan_serving, scheduler_config
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.admission import limit_for
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.engine.memory import MemoryGate, MemoryWatch, Watermarks, settle_heap
from mixtral_serve.engine.watchdog import Watchdog
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.observe.logs import RequestLog, configure_logging
from mixtral_serve.observe.memory import MemoryCollector, MemoryMonitor, PlannedMemory
from mixtral_serve.observe.metrics import EngineMetrics
from mixtral_serve.settings import Settings, to_json
from mixtral_serve.text.chat_format import ChatEncoder, load_chat_format
from mixtral_serve.text.errors import TextError
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer
from scheduler.errors import ConfigError, PlanError

_log = logging.getLogger(__name__)

EXIT_ADDRESS: Final = 1
HOPELESS_FACTOR: Final = 5
"""An engine that stood still so many times longer than makes it not ready is killed and started again."""

ENGINE_ENVIRONMENT: Final = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins at a barrier takes the CPU from the one it waits for
    "GOMP_SPINCOUNT": "3000",  # but not for long: between two products of a step, some 0.1 ms, it stays awake
    "TOKENIZERS_PARALLELISM": "false",  # its threads would fight the model's
    "HF_HUB_OFFLINE": "1",  # nothing is ever fetched while serving
    "MALLOC_ARENA_MAX": "2",  # freed memory goes back instead of staying in one arena per thread
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",  # of 1024 by default, at about a megabyte each
}


def run_server(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code: 0, 78 for what cannot be served, 1 for an address that is taken."""
    configure_logging(level=settings.log_level.upper(), style=settings.log_format)
    limit = tightest_limit(settings.memory_cap_bytes)
    try:
        plan = plan_serving(settings, limit)
        scheduler_config(settings, plan)
        open_checkpoint(plan.checkpoint)
        tokenizer = load_tokenizer(plan.checkpoint)
        chat_template = load_chat_format(
            plan.checkpoint, tokenizer, choice=settings.chat_template, strict=settings.strict_chat
        )
    except (CheckpointError, TextError) as error:
        return _refuse(f"{settings.model}: {error}", EXIT_CONFIG)
    except (ConfigError, PlanError) as error:
        return _refuse(str(error), EXIT_CONFIG)
    listening = ServerSettings(settings.host, settings.port, drain_s=settings.shutdown_timeout_s)
    try:
        listener = bind(listening)
    except OSError as error:
        return _refuse(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", EXIT_ADDRESS)
    # The engine plans with what was found here: it must come to the same plan, also when it is started again.
    settings = replace(settings, memory_cap_bytes=limit.num_bytes)
    return asyncio.run(_serve(settings, plan, tokenizer, chat_template, _Port(listening, listener)))


class _Port(NamedTuple):
    """Where the server listens: the socket is open already."""

    settings: ServerSettings
    listener: socket.socket


async def _serve(
    settings: Settings,
    plan: ServingPlan,
    tokenizer: Tokenizer,
    chat_template: ChatEncoder | None,
    where: _Port,
) -> int:
    _log.info("memory plan for %s\n%s", plan.model_names[0], plan.memory.table())
    metrics = EngineMetrics(plan.model_names[0])
    engine = EngineClient(
        engine_launch(settings),
        max_waiting=settings.max_num_queued_reqs,
        max_num_seqs=settings.max_num_seqs,
        listeners=(metrics, RequestLog()),
        watchdog=Watchdog(
            stalled_after_s=settings.stall_timeout_s,
            hopeless_after_s=HOPELESS_FACTOR * settings.stall_timeout_s,
        ),
    )
    monitor = MemoryMonitor(planned_memory(plan), engine)
    metrics.registry.register(MemoryCollector(monitor))
    marks = Watermarks.below(plan.processes_bytes, plan.demands.allocator_slack)
    dependencies = Dependencies(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        model_names=plan.model_names,
        render_metrics=metrics.render,
        memory_report=monitor.report,
        check_memory=MemoryGate(MemoryWatch(marks, read=monitor.total)).check,
        version=__version__,
        settings=ApiSettings(
            max_n=settings.max_n,
            max_body_bytes=settings.max_body_bytes,
            unknown_fields=settings.unknown_fields,
            sse_keep_alive_s=settings.sse_keep_alive_s,
        ),
    )
    host, port = where.listener.getsockname()[:2]

    def welcome(info: ModelInfo) -> None:
        sys.stdout.write(greeting(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", plan, info))
        sys.stdout.flush()

    app = create_app(dependencies)
    settle_heap()
    return await serve(app, engine, where.settings, listener=where.listener, on_ready=welcome)


def engine_launch(settings: Settings) -> EngineLaunch:
    """The command of the engine process."""
    return EngineLaunch(
        (sys.executable, "-m", "mixtral_serve.compose.engine", "--settings", to_json(settings)), ENGINE_ENVIRONMENT
    )


def planned_memory(plan: ServingPlan) -> PlannedMemory:
    """The plan as observers show it."""
    return PlannedMemory(
        cap_bytes=plan.memory.cap_bytes,
        cap_name=plan.memory.cap_name,
        parts={**asdict(plan.demands), "kv_cache": plan.memory.kv_cache_bytes},
        api_bytes=plan.demands.api_process,
        processes_bytes=plan.processes_bytes,
    )


def greeting(url: str, plan: ServingPlan, info: ModelInfo) -> str:
    """What a person sees when the server is ready: the address, and a command that works."""
    question = "What is the capital of France?"
    messages = f'[{{"role": "user", "content": "{question}"}}]'
    body = f'{{"model": "{plan.model_names[0]}", "temperature": 0, "messages": {messages}}}'
    return (
        f"\n  {info.name} is ready on {url}   (context {limit_for(info):,} tokens, "
        f"KV cache {plan.memory.num_kv_tokens:,} tokens)\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d \\\n    '{body}'\n\n"
    )


def _refuse(message: str, exit_code: int) -> int:
    sys.stderr.write(f"mixtral-serve: {message}\n")
    return exit_code
