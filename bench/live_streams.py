"""How much live HTTP streams stretch the engine's steps: the same work with and without them, in turns.

Owns: ``measure_live_streams``. The engine is a process of its own, as in production, over a random checkpoint whose
step is long enough to be stretched. This process is its API process; the clients (``python -m bench.load``) are a third
one. Phases alternate:

    alone     the requests are handed to the engine's client directly; nobody reads their tokens
    streams   as many HTTP clients read as many streams

Every phase runs equally many requests of equal size on the same engine, without a prefix cache, so the steps of all
phases do the same work; only steps in which every request decodes are counted, as the engine timed them. A phase
with streams is compared with the phases before and after it, so a drifting machine does not count as overhead.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Final

from bench.workload import Shape
from mixtral_serve import __version__
from mixtral_serve.api.app import create_app
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.server import ServerSettings, bind, serve
from mixtral_serve.compose.server import engine_launch
from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.client import EngineClient
from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Submit, Tick
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.observe.metrics import EngineMetrics
from mixtral_serve.settings import Settings
from mixtral_serve.text.tokenizer import load_tokenizer

_PROMPT_TOKENS: Final = 32
_FIRST_TOKEN_ID: Final = 300
_LEAST_FULL_STEPS: Final = 8


class OverheadError(Exception):
    """The measurement failed; the message is one line."""


def model_shape(num_layers: int) -> ModelShape:
    """A model whose step of 64 rows takes some 25 ms per layer on two idle AVX2 cores."""
    return ModelShape(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=1536,
        num_layers=num_layers,
        num_query_heads=12,
        num_kv_heads=4,
        head_dim=64,
        num_experts=8,
        num_experts_per_token=2,
        max_model_len=2048,
    )


@dataclass(slots=True)
class Phase:
    """The full decode steps of one phase, seconds."""

    run_s: list[float] = field(default_factory=list)
    """The runner alone."""
    step_s: list[float] = field(default_factory=list)
    """The whole step, as the engine timed it."""
    period_s: list[float] = field(default_factory=list)
    """From one step's message to the next, as this process saw them: the engine's socket work is in it."""
    api_cpu_s: float = 0.0
    """Processor time of this process during the phase, per step."""


class StepRecorder:
    """Listens to the engine's client; keeps the steps in which every seat decodes."""

    def __init__(self, num_running: int) -> None:
        self._num_running = num_running
        self._last_full_s: float | None = None
        self._num_live = 0
        self._ended = asyncio.Event()
        self.num_failed = 0
        self.phase = Phase()

    async def wait_for_end(self) -> None:
        """Until all requests that were submitted have ended."""
        self._ended.clear()
        if self._num_live:
            await self._ended.wait()

    def on_submit(self, submit: Submit, now: float) -> None:
        """See ``EngineListener``."""
        del submit, now
        self._num_live += 1

    def on_tick(self, tick: Tick, now: float) -> None:
        """See ``EngineListener``."""
        self._note_ends(tick)
        timing = tick.timing
        if timing is None or not timing.num_tokens == timing.num_slices == self._num_running:
            self._last_full_s = None
            return
        self.phase.run_s.append(timing.run_s)
        self.phase.step_s.append(timing.total_s)
        if self._last_full_s is not None:
            self.phase.period_s.append(now - self._last_full_s)
        self._last_full_s = now

    def on_state(self, state: EngineState) -> None:
        """See ``EngineListener``."""

    def _note_ends(self, tick: Tick) -> None:
        for delta in tick.deltas:
            if delta.finish_reason is not None:
                self._num_live -= 1
                self.num_failed += delta.finish_reason != "length"
        if not self._num_live:
            self._ended.set()


@dataclass(frozen=True, slots=True)
class LiveStreams:
    """Medians over all phases of a kind, seconds; ratios are medians over the phases with streams."""

    step_alone_s: float
    step_streams_s: float
    ratio: float
    """Of ``step_s``: with streams to alone, against the phases around each."""
    run_ratio: float
    period_ratio: float
    ratios: tuple[float, ...]
    api_cpu_per_step_alone_s: float
    api_cpu_per_step_streams_s: float
    num_steps: int


async def measure_live_streams(
    checkpoint: Path, *, num_running: int, rounds: int, output_tokens: int, threads: int
) -> LiveStreams:
    """Serve ``checkpoint`` and run ``rounds`` phases with streams between ``rounds + 1`` without.

    Raises:
        OverheadError: the engine does not start, or a request fails.
    """
    settings = Settings(
        model=str(checkpoint),
        port=0,
        threads=threads,
        max_num_seqs=num_running,
        max_num_batched_tokens=max(512, num_running * _PROMPT_TOKENS),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        log_level="warning",
    )
    recorder = StepRecorder(num_running)
    metrics = EngineMetrics("overhead")
    engine = EngineClient(
        engine_launch(settings), max_waiting=1024, max_num_seqs=num_running, listeners=(metrics, recorder)
    )
    listening = ServerSettings(port=0)
    listener = bind(listening)
    base_url = "http://{}:{}".format(*listener.getsockname()[:2])
    app = create_app(
        Dependencies(
            engine=engine,
            tokenizer=load_tokenizer(checkpoint),
            chat_template=None,
            model_names=("overhead",),
            render_metrics=metrics.render,
            version=__version__,
        )
    )
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(app, engine, listening, listener=listener, on_ready=lambda _: ready.set()))
    is_ready = asyncio.create_task(ready.wait())
    await asyncio.wait((serving, is_ready), return_when=asyncio.FIRST_COMPLETED)
    if not ready.is_set():
        is_ready.cancel()
        raise OverheadError(f"the engine did not start: code {serving.result()}")
    try:
        size = Shape(_PROMPT_TOKENS, 0, output_tokens)
        return await _in_turns(engine, recorder, base_url, num_running=num_running, rounds=rounds, size=size)
    finally:
        signal.raise_signal(signal.SIGTERM)  # the server's own way to end
        await serving


async def _in_turns(
    engine: EngineClient, recorder: StepRecorder, base_url: str, *, num_running: int, rounds: int, size: Shape
) -> LiveStreams:
    async def alone(seed: int) -> None:
        engine.submit([_submit(seed, number, size) for number in range(num_running)])
        await recorder.wait_for_end()

    async def streams(seed: int) -> None:
        await _run_clients(base_url, num_running, size, seed)

    phases: list[Phase] = []
    await alone(0)  # warms everything up, and does not count
    for number in range(2 * rounds + 1):
        recorder.phase = Phase()
        cpu_s = time.process_time()
        await (streams if number % 2 else alone)(number + 1)
        recorder.phase.api_cpu_s = (time.process_time() - cpu_s) / max(1, len(recorder.phase.step_s))
        phases.append(recorder.phase)
    if recorder.num_failed:
        raise OverheadError(f"{recorder.num_failed} requests failed")
    if min(len(phase.step_s) for phase in phases) < _LEAST_FULL_STEPS:
        raise OverheadError("there were hardly any steps in which all requests decoded; ask for more output tokens")
    return compare(phases)


def compare(phases: Sequence[Phase]) -> LiveStreams:
    """The figures of phases alone, with streams, alone, ..., alone."""
    alone, streams = phases[::2], phases[1::2]

    def ratios(of: str) -> list[float]:
        middle = [median(getattr(phase, of)) for phase in phases]
        return [middle[i] / mean((middle[i - 1], middle[i + 1])) for i in range(1, len(phases), 2)]

    return LiveStreams(
        step_alone_s=median(value for phase in alone for value in phase.step_s),
        step_streams_s=median(value for phase in streams for value in phase.step_s),
        ratio=median(ratios("step_s")),
        run_ratio=median(ratios("run_s")),
        period_ratio=median(ratios("period_s")),
        ratios=tuple(ratios("step_s")),
        api_cpu_per_step_alone_s=median(phase.api_cpu_s for phase in alone),
        api_cpu_per_step_streams_s=median(phase.api_cpu_s for phase in streams),
        num_steps=sum(len(phase.step_s) for phase in phases),
    )


def _submit(seed: int, number: int, size: Shape) -> Submit:
    generator = random.Random(f"{seed}/{number}")
    prompt = array("i", [generator.randrange(_FIRST_TOKEN_ID, 900) for _ in range(size.prompt_tokens)])
    return Submit(
        request_id=f"alone-{seed}-{number}",
        prompt=prompt.tobytes(),
        arrival_s=time.monotonic(),
        max_tokens=size.output_tokens,
        ignore_eos=True,
        skip_special_tokens=False,
        sampling=SamplingParams(temperature=0.0),
    )


async def _run_clients(base_url: str, num_clients: int, size: Shape, seed: int) -> None:
    """One request of each of ``num_clients`` clients, from a process of their own."""
    arguments = {
        "--base-url": base_url,
        "--concurrency": num_clients,
        "--requests": num_clients,
        "--duration": 600,
        "--timeout": 600,
        "--warmup": 0,
        "--prompt-tokens": size.prompt_tokens,
        "--shared-prefix-tokens": size.shared_prefix_tokens,
        "--output-tokens": size.output_tokens,
        "--seed": seed,
        "--json": "/dev/stdout",
        "--plot": "/dev/null",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.load",
        *(str(word) for pair in arguments.items() for word in pair),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    text = output.decode()
    if process.returncode or (figures := json.loads(text[text.index("{") :]))["errors"]:
        raise OverheadError(f"the clients failed:\n{text}")
    assert figures["requests"] == num_clients, "each client sent one request"
