"""A server process around a fake model: ``fake_server.py DIRECTORY SCRIPT DRAIN_S`` prints its port, then "ready"."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mixtral_serve.api.app import create_app
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.server import ServerSettings, bind, serve
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.observe.logs import RequestLog, configure_logging
from mixtral_serve.observe.metrics import EngineMetrics
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.tokenizer import load_tokenizer


async def main(directory: Path, script: str, drain_s: float) -> int:
    configure_logging()
    metrics = EngineMetrics("tiny")
    launch = EngineLaunch((sys.executable, "-m", "mixtral_serve.engine.fakes", "--script", script))
    engine = EngineClient(launch, max_waiting=64, listeners=[metrics, RequestLog()])
    tokenizer = load_tokenizer(directory)
    app = create_app(
        Dependencies(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=load_chat_template(directory, tokenizer),
            model_names=("tiny",),
            render_metrics=metrics.render,
            version="0.0.0",
        )
    )
    settings = ServerSettings(port=0, drain_s=drain_s)
    listener = bind(settings)
    print(listener.getsockname()[1], flush=True)  # noqa: T201
    return await serve(app, engine, settings, listener=listener, on_ready=announce)


def announce(info: ModelInfo) -> None:
    print("ready", info.name, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
