"""Builds and runs the API process, which in turn starts the engine process.

Everything that can be refused is refused before the engine is started and before the port is opened: a plan
over the cap, a checkpoint without tokenizer, an address that is taken.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Final

from mixtral_serve import __version__
from mixtral_serve.api.app import create_app
from mixtral_serve.api.deps import ApiSettings, Dependencies
from mixtral_serve.api.server import ServerSettings, bind, serve
from mixtral_serve.compose.plan import ServingPlan, plan_serving, scheduler_config
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.engine.watchdog import Watchdog
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.observe.logs import RequestLog, configure_logging
from mixtral_serve.observe.metrics import EngineMetrics
from mixtral_serve.settings import Settings, to_json
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.errors import TextError
from mixtral_serve.text.tokenizer import load_tokenizer
from scheduler.errors import ConfigError, PlanError

_log = logging.getLogger(__name__)

EXIT_ADDRESS: Final = 1

ENGINE_ENVIRONMENT: Final = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads would fight the model's
    "HF_HUB_OFFLINE": "1",  # nothing is ever fetched while serving
    "MALLOC_ARENA_MAX": "2",  # freed memory goes back instead of staying in one arena per thread
}


def run_server(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code: 0, 78 for what cannot be served, 1 for an address that is taken."""
    configure_logging(settings.log_level, settings.log_format)
    try:
        plan = plan_serving(settings)
        scheduler_config(settings, plan)
        metrics = EngineMetrics(model_name=plan.model_names[0], max_model_len=plan.max_model_len)
        dependencies = _dependencies(settings, plan, metrics)
    except (CheckpointError, TextError) as error:
        return _refuse(f"{settings.model}: {error}")
    except (ConfigError, PlanError) as error:
        return _refuse(str(error))
    _log.info("memory plan for %s\n%s", plan.model_names[0], plan.memory.table())
    return asyncio.run(_serve(settings, dependencies, metrics))
