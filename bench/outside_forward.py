"""What a decode step costs besides the model's forward: a real scheduler, engine core and runner around a model that
computes nothing.

Owns: ``measure_outside_forward``. Everything runs in one process and one thread, so the parts can be told apart;
in the server the last two run in the API process, beside the engine's next step.

    schedule    Scheduler.step and Scheduler.commit
    runner      MixtralRunner.run less the forward (and the head): laying out the row, sampling, results
    outputs     stop strings, detokenising, deltas
    message     the tick to bytes, and back
    events      deltas into their streams, and each as a ready server-sent event
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Final, cast

import torch
from transformers import MixtralForCausalLM

from mixtral_serve.api.completion_format import CompletionFormat
from mixtral_serve.api.formats import AnswerHead, Extras
from mixtral_serve.contract import ModelInfo, SamplingParams
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.errors import RequestFailed
from mixtral_serve.engine.messages import Delta, Submit, Tick, decode_outbox, encode
from mixtral_serve.engine.stream import TokenStream
from mixtral_serve.engine.transport import FrameDecoder, frame
from mixtral_serve.kernels import native
from mixtral_serve.model.kv_cache import allocate_kv_cache
from mixtral_serve.model.runner import MixtralRunner
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.config import SchedulerConfig
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler

PARTS: Final = ("schedule", "runner", "outputs", "message", "events")
_BLOCK_SIZE: Final = 16
_WARM_UP_STEPS: Final = 20
_PROMPT_TOKENS: Final = 64

SAMPLINGS: Final = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(temperature=1.0, seed=1),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95, top_k=50, seed=1),
    "nucleus": SamplingParams(temperature=1.0, top_p=0.95, seed=1),  # two thirds of a vocabulary of normal logits
}
_SHAPE: Final = ModelShape(
    vocab_size=32000,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_query_heads=2,
    num_kv_heads=1,
    head_dim=32,
    num_experts=2,
    num_experts_per_token=2,
    max_model_len=4096,
)
"""Mixtral's vocabulary, which sampling sees; nothing else of it is computed with."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Medians over the measured steps, seconds."""

    parts_s: Mapping[str, float]
    total_s: float
    """Median of the sums."""


@dataclass(slots=True)
class _Samples:
    parts_s: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def cost(self) -> StepCost:
        sums = [sum(values) for values in zip(*self.parts_s.values(), strict=True)]
        return StepCost({part: median(values) for part, values in self.parts_s.items()}, median(sums))


class _NoForward:
    """Stands where the model stands: hidden states and logits are there at once.

    Like a model's head, it leaves logits that all threads have just touched. What that takes is the forward's time, and
    not counted.
    """

    def __init__(self, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.zeros(1, num_rows * _PROMPT_TOKENS, _SHAPE.hidden_size)
        self._scores = torch.randn(num_rows, _SHAPE.vocab_size, generator=generator)
        self.head_s = 0.0
        """What the last call of the head took."""

    def model(self, *, input_ids: torch.Tensor, **_others: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._hidden[:, : input_ids.shape[-1]])

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        began_s = time.perf_counter()
        scores = self._scores[: hidden.shape[0]]
        scores.sum()
        self.head_s = time.perf_counter() - began_s
        return scores


def measure_outside_forward(num_running: int, num_steps: int, sampling: SamplingParams) -> StepCost:
    """The cost of ``num_steps`` decode steps of ``num_running`` requests."""
    num_output_tokens = num_steps + _WARM_UP_STEPS + 2
    model = _NoForward(num_running)
    core, table = _engine(model, num_running, _PROMPT_TOKENS + num_output_tokens)
    requests = [_submit(number, num_output_tokens, sampling) for number in range(num_running)]
    api = _ApiSide(table, [request.request_id for request in requests])
    core.handle(requests)
    samples = _Samples()
    num_full = 0
    while num_full < num_steps + _WARM_UP_STEPS:
        began_s = time.perf_counter()
        tick = core.tick()
        ticked_s = time.perf_counter()
        assert tick is not None, "requests of this length are not done yet"
        timing = tick.timing
        assert timing is not None, "a tick with requests runs a step"
        received, message_s = _over_the_wire(tick)
        events_s = api.take(received)
        if timing.num_tokens == timing.num_slices == num_running:
            num_full += 1
            if num_full > _WARM_UP_STEPS:
                outputs_s = (ticked_s - began_s) - timing.schedule_s - timing.run_s
                parts_s = (timing.schedule_s, timing.run_s - model.head_s, outputs_s, message_s, events_s)
                for part, value in zip(PARTS, parts_s, strict=True):
                    samples.parts_s[part].append(value)
    return samples.cost()


def _engine(model: _NoForward, num_running: int, num_tokens: int) -> tuple[EngineCore, TokenBytes]:
    """A core around ``model`` with seats for all, and the vocabulary it detokenises with."""
    num_blocks = 1 + num_running * (-(-num_tokens // _BLOCK_SIZE))
    cache = allocate_kv_cache(
        _SHAPE,
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        dtype="fp32",
        compute_dtype=torch.float32,
        is_native=native.is_available(),
    )
    info = ModelInfo(
        name="no-forward",
        fingerprint="no-forward",
        vocab_size=_SHAPE.vocab_size,
        max_model_len=_SHAPE.max_model_len,
        eos_token_ids=(2,),
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        weights_bytes=0,
        kv_cache_bytes=cache.num_bytes,
    )
    runner = MixtralRunner(cast(MixtralForCausalLM, model), _SHAPE, cache=cache, info=info)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * _PROMPT_TOKENS,  # all prompts in the first step
        max_model_len=_SHAPE.max_model_len,
    )
    table = TokenBytes(
        {token_id: b" word%d" % token_id for token_id in range(_SHAPE.vocab_size)}, special_ids=(0, 1, 2)
    )
    return EngineCore(Scheduler(config, POLICIES["fcfs"]()), runner, table), table


def _submit(number: int, num_output_tokens: int, sampling: SamplingParams) -> Submit:
    prompt = array("i", [3 + (number * 7919 + i * 31) % 30000 for i in range(_PROMPT_TOKENS)])
    return Submit(
        request_id=f"request-{number}",
        prompt=prompt.tobytes(),
        arrival_s=time.monotonic(),
        max_tokens=num_output_tokens,
        ignore_eos=True,
        stop=("no such text",),
        sampling=sampling,
    )


def _over_the_wire(tick: Tick) -> tuple[Tick, float]:
    """The tick as the API process gets it, and the seconds that encoding and decoding took."""
    began_s = time.perf_counter()
    (payload,) = FrameDecoder().feed(frame(encode(tick)))
    received = decode_outbox(payload)
    took_s = time.perf_counter() - began_s
    assert isinstance(received, Tick), "what went in comes out"
    return received, took_s


class _ApiSide:
    """What the API process does with a tick, up to the bytes of each event."""

    def __init__(self, table: TokenBytes, request_ids: list[str]) -> None:
        self._streams = {name: TokenStream(name, lambda _: None, _failed) for name in request_ids}
        self._formats = {
            name: CompletionFormat(
                AnswerHead(name, 0, "no-forward", "no-forward"),
                table,
                Extras(include_usage=True),
                logprobs=None,
                echoes=None,
                skip_special_tokens=True,
            )
            for name in request_ids
        }

    def take(self, tick: Tick) -> float:
        """Hand out the deltas and write the events. Returns the seconds it took."""
        began_s = time.perf_counter()
        for delta in tick.deltas:
            self._streams[delta.request_id].push(delta)
        for delta in tick.deltas:
            self._formats[delta.request_id].chunk(0, delta)
        return time.perf_counter() - began_s


def _failed(delta: Delta) -> RequestFailed:
    return RequestFailed("the request failed", detail=delta.error or "")
