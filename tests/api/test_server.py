"""The server as a process: how it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mixtral_serve.api.server import ServerSettings, bind

SERVER = Path(__file__).with_name("fake_server.py")
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
SLOW = {"never_ends": True, "step_s": 0.02}
BRIEF = {"output": "x" * 60, "step_s": 0.02}

pytestmark = pytest.mark.slow


@dataclass
class Running:
    """A server process and a client of it."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def signal(self, number: signal.Signals) -> float:
        self.process.send_signal(number)
        return time.monotonic()

    def exit_code(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def wait_for_status(self, path: str, status: int) -> httpx.Response:
        """Ask until the answer has this status; the socket may not listen yet."""
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if (response := self.client.get(path)).status_code == status:
                    return response
            time.sleep(0.02)


StartServer = Callable[..., Running]


@pytest.fixture
def start(checkpoint: Path) -> Iterator[StartServer]:
    started: list[Running] = []

    def run(script: dict[str, Any], *, drain_s: float = 5.0, wait_ready: bool = True) -> Running:
        arguments = [str(checkpoint), json.dumps({"tokenizer": str(checkpoint)} | script), str(drain_s)]
        command = [sys.executable, str(SERVER), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if wait_ready:
            assert process.stdout.readline().startswith("ready")
        running = Running(process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20))
        started.append(running)
        return running

    yield run
    for running in started:
        running.client.close()
        running.process.kill()
        running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


def events(lines: Iterator[str]) -> list[Any]:
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines if line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row58_an_idle_server_ends_at_once_with_0(start: StartServer, number: signal.Signals) -> None:
    server = start({"output": "x"})
    assert server.client.get("/readyz").status_code == 200
    began = server.signal(number)
    assert server.exit_code() == 0
    assert time.monotonic() - began < 5


def test_row58_row59_a_busy_server_finishes_what_runs_and_refuses_what_comes(start: StartServer) -> None:
    server = start(BRIEF)
    with server.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        with httpx.Client(base_url=server.client.base_url) as other:
            while (refused := other.post("/v1/chat/completions", json=BODY)).status_code == 200:
                time.sleep(0.02)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_is_overloaded"
            assert int(refused.headers["retry-after"]) > 0
            assert other.get("/readyz").status_code == 503
            assert other.get("/livez").status_code == 200
        said = events(lines)
    assert said[-1] == "[DONE]"
    assert server.exit_code() == 0


def test_row58_what_is_left_at_the_end_of_the_drain_gets_an_error_event(start: StartServer) -> None:
    server = start(SLOW, drain_s=0.5)
    with server.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = response.iter_lines()
        next(lines)
        began = server.signal(signal.SIGTERM)
        said = events(lines)
    assert said[-1]["error"]["code"] == "interrupted"
    assert "[DONE]" not in said
    assert server.exit_code() == 0
    assert 0.5 <= time.monotonic() - began < 5.5


def test_row58_a_second_signal_ends_everything_at_once(start: StartServer) -> None:
    server = start(SLOW, drain_s=60)
    with server.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        with httpx.Client(base_url=server.client.base_url) as other:
            while other.get("/readyz").status_code != 503:
                time.sleep(0.02)
        began = server.signal(signal.SIGINT)
        assert events(lines)[-1]["error"]["code"] == "interrupted"
    assert server.exit_code() == 0
    assert time.monotonic() - began < 3


def test_row58_sighup_changes_nothing(start: StartServer) -> None:
    server = start({"output": "x"})
    server.signal(signal.SIGHUP)
    body = BODY | {"stream": False}
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0


def test_row58_a_server_whose_model_still_loads_is_live_not_ready_and_can_be_stopped(start: StartServer) -> None:
    server = start({"load_s": 60}, wait_ready=False, drain_s=60)
    server.wait_for_status("/livez", 200)
    assert server.client.get("/readyz").status_code == 503
    refused = server.client.post("/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert "retry-after" in refused.headers
    began = server.signal(signal.SIGTERM)
    assert server.exit_code() == 0
    assert time.monotonic() - began < 5


def test_an_engine_that_cannot_start_ends_the_server_with_its_code(start: StartServer) -> None:
    server = start({"load_error": "shard 7 is missing"}, wait_ready=False)
    assert server.exit_code() == 78


def test_an_address_in_use_is_an_error_at_once() -> None:
    with bind(ServerSettings(port=0)) as taken:
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            bind(ServerSettings(port=taken.getsockname()[1]))
