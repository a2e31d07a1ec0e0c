"""Tiny checkpoints, a single-threaded PyTorch, and a driver that runs requests through the real scheduler."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_serve.contract import RunBatch, Runner, SamplingParams
from mixtral_serve.model.runner import LogitsListener, MixtralRunner, Numerics, load_runner
from mixtral_serve.model.shape import ModelShape, Weights
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from scheduler.config import SchedulerConfig
from scheduler.events import Event, Finished, Preempted, PrefixHit, PromptScored, TokenLogprob, TokensCommitted
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.request import Request, RequestId, RequestKind, StopRule
from scheduler.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine the barriers cost a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_shape() -> ModelShape:
    return ModelShape(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        num_layers=2,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=10,
        num_experts=4,
        num_experts_per_token=2,
        max_model_len=256,
        rope_theta=10000.0,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_shape: ModelShape) -> Path:
    """One checkpoint for all tests that only read."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_synthetic_checkpoint(path, tiny_shape, seed=1, weights="fp32")
    return path


RunnerMaker = Callable[..., MixtralRunner]


@pytest.fixture(scope="session")
def make_runner(tiny_checkpoint: Path) -> RunnerMaker:
    """A runner on the tiny checkpoint (or another), single-threaded."""

    def make(
        path: Path | None = None,
        *,
        weights: Weights = "fp32",
        num_blocks: int = 64,
        block_size: int = 4,
        num_threads: int = 1,
        logits_listener: LogitsListener | None = None,
        **numerics: Any,
    ) -> MixtralRunner:
        return load_runner(
            path or tiny_checkpoint,
            Numerics(weights=weights, **numerics),
            num_blocks=num_blocks,
            block_size=block_size,
            num_threads=num_threads,
            logits_listener=logits_listener,
        )

    return make


@dataclass
class Driven:
    """What a run through the scheduler produced."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob | None]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    num_preemptions: int = 0
    num_hit_tokens: int = 0
    num_steps: int = 0

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case TokensCommitted():
                    self.tokens.setdefault(event.request_id, []).append(event.token_id)
                    self.logprobs.setdefault(event.request_id, []).append(event.logprob)
                case PromptScored():
                    self.prompt_logprobs.setdefault(event.request_id, []).extend(event.logprobs)
                case Finished():
                    self.finished[event.request_id] = event
                case Preempted():
                    self.num_preemptions += 1
                case PrefixHit():
                    self.num_hit_tokens += event.num_hit_tokens
                case _:
                    pass


Drive = Callable[..., Driven]


@pytest.fixture(scope="session")
def drive() -> Drive:
    """Run requests to their ends; ``arrivals`` gives the step at which each comes (default: all at once)."""

    def run(
        runner: Runner,
        requests: Sequence[Request],
        *,
        arrivals: Sequence[int] = (),
        sampling: Mapping[str, SamplingParams] | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_prefill_chunk: int | None = None,
        max_steps: int = 5000,
    ) -> Driven:
        config = SchedulerConfig(
            num_blocks=runner.info.num_blocks,
            block_size=runner.info.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prefill_chunk=max_prefill_chunk,
            max_model_len=runner.info.max_model_len,
        )
        scheduler = Scheduler(config, FCFSPolicy())
        pending = sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
        driven = Driven()
        while pending or scheduler.has_work:
            while pending and pending[0][0] <= driven.num_steps:
                scheduler.add(pending.pop(0)[1], float(driven.num_steps))
            plan = scheduler.step(float(driven.num_steps))
            params = tuple((sampling or {}).get(part.request_id, GREEDY) for part in plan.slices)
            driven.take(plan.events)
            driven.take(scheduler.commit(runner.run(RunBatch(plan, params)), float(driven.num_steps)))
            driven.num_steps += 1
            assert driven.num_steps < max_steps, "the requests do not end"
        return driven

    return run


MakeRequest = Callable[..., Request]


@pytest.fixture(scope="session")
def make_request() -> MakeRequest:
    def make(
        name: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 0,
        kind: RequestKind = RequestKind.GENERATE,
        prompt_logprobs: bool = False,
    ) -> Request:
        return Request(
            RequestId(name),
            array("i", prompt),
            StopRule(max_tokens),
            0.0,
            kind=kind,
            prompt_logprobs=prompt_logprobs,
        )

    return make
