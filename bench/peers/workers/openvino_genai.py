"""OpenVINO GenAI: its continuous-batching pipeline, step by step, without the server around it.

Runs in OpenVINO's environment.
"""

from __future__ import annotations

import time

import numpy as np
import openvino
import openvino_genai
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from bench.peers.protocol import Facts, WorkerOptions, decode_prompt, run_worker

_MAX_BATCHED_TOKENS = 2048
_CACHE_GIGABYTES = 1


class OpenVino:
    """Implements ``bench.peers.protocol.Contender``."""

    def __init__(self, options: WorkerOptions) -> None:
        scheduler = SchedulerConfig()
        scheduler.cache_size = _CACHE_GIGABYTES
        scheduler.max_num_seqs = options.sequences
        scheduler.max_num_batched_tokens = max(_MAX_BATCHED_TOKENS, options.sequences)
        self._pipeline = ContinuousBatchingPipeline(
            str(options.model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": options.threads}
        )
        self._options = options
        self._num_requests = 0

    @property
    def facts(self) -> Facts:
        """See ``Contender``."""
        details: dict[str, object] = {"openvino": openvino.__version__, "threads": self._options.threads}
        return Facts(f"openvino-genai {openvino_genai.__version__}", details)

    def decode(self, batch: int, steps: int, context: int) -> float:
        """See ``Contender``."""
        num_tokens = steps + batch + 2
        handles = [self._add(decode_prompt(sequence, context), num_tokens) for sequence in range(batch)]
        started: set[int] = set()
        while len(started) < batch:
            self._pipeline.step()
            started |= {number for number, handle in enumerate(handles) if handle.can_read() and handle.read()}
        self._pipeline.step()
        began_s = time.perf_counter()
        for _ in range(steps):
            self._pipeline.step()
        took_s = time.perf_counter() - began_s
        for handle in handles:
            handle.cancel()
        self._finish()
        return took_s

    def prefill(self, prompt: list[int]) -> float:
        """See ``Contender``."""
        began_s = time.perf_counter()
        handle = self._add(prompt, 1)
        while not (handle.can_read() and handle.read()):
            self._pipeline.step()
        took_s = time.perf_counter() - began_s
        self._finish()
        return took_s

    def _add(self, prompt: list[int], num_tokens: int) -> openvino_genai.GenerationHandle:
        wanted = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, ignore_eos=True)
        self._num_requests += 1
        tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(self._num_requests, tokens, wanted)

    def _finish(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


if __name__ == "__main__":
    run_worker(OpenVino)
