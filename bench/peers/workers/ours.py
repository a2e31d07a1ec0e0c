"""mixtral-serve itself: the real scheduler and runner, step by step, without the processes and HTTP around them.

A step is timed whole: planning, the runner with its sampling, committing. The prefix cache is on, as in service; it
spares the measurement the prompts of decoding sequences it has seen, never a token of what is timed.
"""

from __future__ import annotations

import time
from array import array
from typing import get_args

import torch

from bench.peers.protocol import Facts, UnavailableError, WorkerOptions, decode_prompt, run_worker
from mixtral_serve import __version__
from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.kernels.registry import KernelsUnavailableError
from mixtral_serve.model.runner import Numerics, load_runner
from mixtral_serve.model.shape import Weights
from scheduler.config import SchedulerConfig
from scheduler.lifecycle import FinishReason
from scheduler.plan import StepPlan
from scheduler.policies import POLICIES
from scheduler.request import Request, RequestId, StopRule
from scheduler.scheduler import Scheduler

_BLOCK_SIZE = 16
_MAX_BATCHED_TOKENS = 2048
_GREEDY = SamplingParams(temperature=0.0)


class Ours:
    """Implements ``bench.peers.protocol.Contender``."""

    def __init__(self, options: WorkerOptions, weights: Weights) -> None:
        num_blocks = 1 + (options.sequences + 1) * -(-options.positions // _BLOCK_SIZE)
        self._runner = load_runner(
            options.model,
            Numerics(weights=weights),
            num_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
            num_threads=options.threads,
        )
        config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
            max_num_seqs=options.sequences,
            max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, options.sequences),
        )
        self._scheduler = Scheduler(config, POLICIES["fcfs"]())
        self._num_requests = 0

    @property
    def facts(self) -> Facts:
        """See ``Contender``."""
        return Facts(__version__, {"fingerprint": self._runner.info.fingerprint, "threads": torch.get_num_threads()})

    def decode(self, batch: int, steps: int, context: int) -> float:
        """See ``Contender``."""
        names = [self._add(decode_prompt(number, context), steps + batch + 2) for number in range(batch)]
        while not self._is_full_decode(self._step(), batch):
            pass
        began_s = time.perf_counter()
        for _ in range(steps):
            plan = self._step()
            assert self._is_full_decode(plan, batch), "every step decodes every sequence"
        took_s = time.perf_counter() - began_s
        for name in names:
            self._scheduler.finish(name, FinishReason.CANCELLED)
        return took_s

    def prefill(self, prompt: list[int]) -> float:
        """See ``Contender``."""
        began_s = time.perf_counter()
        self._add(prompt, 1)
        while self._scheduler.has_work:
            self._step()
        return time.perf_counter() - began_s

    def _add(self, prompt: list[int], num_output_tokens: int) -> RequestId:
        name = RequestId(f"request-{self._num_requests}")
        self._num_requests += 1
        stop = StopRule(max_tokens=num_output_tokens)
        now = time.monotonic()
        self._scheduler.add(Request(name, array("i", prompt), stop, arrival_s=now), now)
        return name

    def _step(self) -> StepPlan:
        plan = self._scheduler.step(time.monotonic())
        result = self._runner.run(RunBatch(plan, (_GREEDY,) * len(plan.slices)))
        self._scheduler.commit(result, time.monotonic())
        return plan

    @staticmethod
    def _is_full_decode(plan: StepPlan, batch: int) -> bool:
        return len(plan.slices) == batch and all(
            part.num_output_tokens and part.num_tokens == 1 for part in plan.slices
        )


def load(options: WorkerOptions) -> Ours:
    """The contender with the weights that ``variant`` names.

    Raises:
        UnavailableError: nothing here computes with such weights.
    """
    for known in get_args(Weights):
        if options.variant == known:
            try:
                return Ours(options, known)
            except (KernelsUnavailableError, NativeUnavailableError) as error:
                raise UnavailableError(str(error)) from error
    raise UnavailableError(f"there are no {options.variant} weights, only {', '.join(get_args(Weights))}")


if __name__ == "__main__":
    run_worker(load)
