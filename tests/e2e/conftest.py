"""A real server process with the bundled demo model, and the official ``openai`` client in front of it.

Nothing here sleeps for a fixed time: conditions are polled until they hold or a deadline has passed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import openai
import pytest

COMMAND = Path(sys.executable).parent / "mixtral-serve"
START_S = 90.0
"""A start takes some five seconds on an idle machine."""
_READY_LINE = re.compile(r"is ready on (http://\S+)")


def eventually(condition: Callable[[], Any], *, what: str, within_s: float = 20.0) -> Any:
    """The first true value of ``condition``."""
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"within {within_s:g} s: {what}"
        time.sleep(0.02)
    return value


def environment() -> dict[str, str]:
    """Ours, without what would configure the server from outside."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_SERVE_")}


class ServerProcess:
    """``mixtral-serve serve`` on a free port. A context manager; leaves nothing running behind."""

    def __init__(self, directory: Path, flags: Sequence[str] = ()) -> None:
        self._log_path = directory / "server.log"
        # One thread: a small model gains nothing from two, and tests share the machine with others.
        arguments = [str(COMMAND), "serve", "--port", "0", "--threads", "1", "--kv-cache-memory-bytes", "134217728"]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*arguments, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        self.base_url = ""

    def __enter__(self) -> Self:
        try:
            self.base_url = eventually(self._announced_url, what="the server says that it is ready", within_s=START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return self._log_path.read_text("utf-8", "replace")

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client, without retries: a test wants the first answer."""
        return openai.OpenAI(**self._options(options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options))

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.base_url + path, timeout=10.0)

    def metric(self, name: str) -> float:
        """The sum over the labels of one of vLLM's metrics."""
        values = [
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").text.splitlines()
            if re.match(rf"vllm:{name}(\{{|\s)", line)
        ]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_until_quiet(self) -> None:
        """Nothing runs, nothing waits, and every KV block is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        eventually(lambda: all(self.metric(name) == 0 for name in names), what="the server is at rest")

    def wait_until_metric(self, name: str, value: float) -> None:
        eventually(lambda: self.metric(name) == value, what=f"{name} is {value:g}")

    def wait_until_status(self, path: str, status: int) -> None:
        """Until ``path`` answers with ``status``; answers that do not come at all count as none."""
        eventually(lambda: self._status(path) == status, what=f"{path} answers {status}", within_s=START_S)

    def engine_pid(self) -> int:
        """Process id of the engine, the server's only child."""
        return int(eventually(self._child_pid, what="there is an engine process"))

    def wait_until_gone(self, pid: int) -> None:
        """Until there is no such process, or nothing but its exit code, which init will collect."""
        eventually(lambda: _state_of(pid) in (None, "Z"), what=f"process {pid} is gone")

    def wait_for_exit(self, within_s: float) -> int:
        """The exit code."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server still runs after {within_s:g} s; its log:\n{self.log}")

    def _announced_url(self) -> str | None:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended with {self.process.returncode}; its log:\n{self.log}")
        found = _READY_LINE.search(self.log)
        return found[1] if found else None

    def _status(self, path: str) -> int | None:
        try:
            return self.get(path).status_code
        except httpx.TransportError:
            return None

    def _child_pid(self) -> int | None:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                parent = re.search(r"^PPid:\s+(\d+)$", status.read_text(), re.MULTILINE)
            except OSError:  # it has ended since
                continue
            if parent is not None and int(parent[1]) == self.process.pid:
                return int(status.parent.name)
        return None

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": self.base_url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 120.0, **options}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they found it. Sixteen seats, so that 32 clients also queue; small
    steps, so that prompts are computed in chunks and a long one takes its time."""
    with ServerProcess(
        tmp_path_factory.mktemp("server"), ["--max-num-seqs", "16", "--max-num-batched-tokens", "64"]
    ) as running:
        yield running


@pytest.fixture
def quiet_server(server: ServerProcess) -> Iterator[ServerProcess]:
    """The shared server; afterwards it must still answer, and hold nothing."""
    yield server
    assert server.process.poll() is None, f"the server ended:\n{server.log}"
    server.wait_until_quiet()
    canary(server)


@pytest.fixture
def new_server(tmp_path: Path) -> Callable[..., ServerProcess]:
    """``with new_server("--flag", ...) as server``: for tests that break it."""
    return lambda *flags: ServerProcess(tmp_path, flags)


def _state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def canary(server: ServerProcess) -> None:
    """A small request that must always succeed."""
    answer = server.client().completions.create(model=model_of(server), prompt="One two", max_tokens=2, temperature=0)
    assert answer.choices[0].finish_reason in ("stop", "length")


def model_of(server: ServerProcess) -> str:
    return server.client().models.list().data[0].id
