"""Fixtures of the engine's tests: a driver for a core without a process, and a client with a fake engine process."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from mixtral_serve.contract import Runner, SamplingParams
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.fakes import FakeRunner, FakeScript, byte_ids, fake_parts
from mixtral_serve.engine.launch import EngineLaunch
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.memory import MemoryWatch
from mixtral_serve.engine.messages import Cancel, Delta, Submit, Tick
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.invariants import check

GREEDY = SamplingParams(temperature=0.0)


def make_submit(request_id: str, prompt: Sequence[int] | str = "Hi", **fields: Any) -> Submit:
    """A greedy request of 16 tokens; a text prompt gets a ``<s>`` in front."""
    ids = [1, *byte_ids(prompt)] if isinstance(prompt, str) else list(prompt)
    fields = {"max_tokens": 16, "sampling": GREEDY, "arrival_s": 0.0, **fields}
    return Submit(request_id=request_id, prompt=array("i", ids).tobytes(), **fields)


class Driver:
    """Drives a core step by step, collects its deltas and checks the laws that hold between steps."""

    def __init__(
        self,
        script: FakeScript | None = None,
        *,
        runner: Runner | None = None,
        table: TokenBytes | None = None,
        memory: MemoryWatch | None = None,
    ) -> None:
        parts = fake_parts(script or FakeScript())
        self.scheduler = parts.scheduler
        self.runner = runner or parts.runner
        self.now = 0.0
        self.core = EngineCore(
            parts.scheduler,
            self.runner,
            table or parts.token_bytes,
            memory=memory,
            clock=lambda: self.now,
            max_failed_steps=3,
        )
        self.deltas: dict[str, list[Delta]] = {}
        self.last_tick: Tick | None = None

    @property
    def fake(self) -> FakeRunner:
        assert isinstance(self.runner, FakeRunner)
        return self.runner

    def submit(self, request_id: str, prompt: Sequence[int] | str = "Hi", **fields: Any) -> None:
        self.core.handle([make_submit(request_id, prompt, **fields)])

    def cancel(self, *request_ids: str) -> None:
        self.core.handle([Cancel(request_id) for request_id in request_ids])

    def tick(self) -> Tick | None:
        self.now += 0.01
        tick = self.core.tick()
        check(self.scheduler)
        if tick is not None:
            self.last_tick = tick
            assert len({d.request_id for d in tick.deltas}) == len(tick.deltas), "one delta per request per tick"
            for delta in tick.deltas:
                story = self.deltas.setdefault(delta.request_id, [])
                assert not story or story[-1].finish_reason is None, "I27: nothing follows the last delta"
                story.append(delta)
        return tick

    def run(self, max_ticks: int = 20_000) -> None:
        """Tick until nothing is left to do."""
        for _ in range(max_ticks):
            if self.tick() is None:
                self.assert_quiet()
                return
        raise AssertionError("the engine does not come to rest")

    def assert_quiet(self) -> None:
        """I29: nothing is held once nobody lives."""
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_preempted, stats.num_used_blocks) == (0, 0, 0, 0)
        assert not self.core.has_work

    def text(self, request_id: str) -> str:
        return "".join(d.text for d in self.deltas[request_id])

    def tokens(self, request_id: str) -> list[int]:
        return [t for d in self.deltas[request_id] for t in d.token_ids]

    def last(self, request_id: str) -> Delta:
        delta = self.deltas[request_id][-1]
        assert delta.finish_reason is not None
        return delta

    def end(self, request_id: str) -> str:
        reason = self.last(request_id).finish_reason
        assert reason is not None
        return reason


@pytest.fixture(scope="session")
def new_driver() -> type[Driver]:
    return Driver


@pytest.fixture(scope="session")
def submit_of() -> Callable[..., Submit]:
    return make_submit


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.submits: list[str] = []
        self.ticks: list[Tick] = []
        self.states: list[EngineState] = []

    def on_submit(self, submit: Submit, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.submits.append(submit.request_id)

    def on_tick(self, tick: Tick, now: float) -> None:  # noqa: ARG002 - the protocol's
        self.ticks.append(tick)

    def on_state(self, state: EngineState) -> None:
        self.states.append(state)

    def ends(self, request_id: str) -> list[str | None]:
        return [
            d.finish_reason
            for tick in self.ticks
            for d in tick.deltas
            if d.request_id == request_id and d.finish_reason is not None
        ]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def launch_of(script: FakeScript) -> EngineLaunch:
    """A fake engine process that finds the packages wherever the tests found them."""
    argv = (sys.executable, "-m", "mixtral_serve.engine.fakes", "--script", msgspec.json.encode(script).decode())
    return EngineLaunch(argv, {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


@pytest.fixture(scope="session")
def new_client() -> Callable[..., Any]:
    """``async with new_client(script, ...) as client``: started, stopped in the end whatever happened."""

    @asynccontextmanager
    async def opened(script: FakeScript | EngineLaunch, **options: Any) -> AsyncIterator[EngineClient]:
        launch = script if isinstance(script, EngineLaunch) else launch_of(script)
        client = EngineClient(launch, **{"max_waiting": 1000, **options})
        await client.start()
        try:
            yield client
        finally:
            await client.stop(0.0)

    return opened


@pytest.fixture(scope="session")
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a coroutine on a fresh event loop, within a minute."""

    def run_it(coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run(asyncio.wait_for(coroutine, 60.0))

    return run_it


@pytest.fixture(scope="session")
def until() -> Callable[..., Coroutine[Any, Any, None]]:
    """Waits for a condition that another process brings about."""

    async def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not come true"
            await asyncio.sleep(0.005)

    return wait_until
