"""vLLM's CPU build: its engine in this process, step by step, without the server around it.

Prompts are computed whole. The prefix cache is on, as it is by default; fresh prompts share nothing.

Runs in vLLM's environment.
"""

from __future__ import annotations

import os
import time

# Read when vLLM is imported: the engine shall not be a process of its own, nor ask anybody for anything.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams

from bench.peers.protocol import Facts, WorkerOptions, decode_prompt, run_worker

_MAX_BATCHED_TOKENS = 2048
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Vllm:
    """Implements ``bench.peers.protocol.Contender``."""

    def __init__(self, options: WorkerOptions) -> None:
        cpus = sorted(os.sched_getaffinity(0))[: options.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        arguments = EngineArgs(
            model=str(options.model),
            dtype=_DTYPES[options.variant],
            max_model_len=options.positions,
            max_num_seqs=options.sequences,
            max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, options.sequences),
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._num_requests = 0

    @property
    def facts(self) -> Facts:
        """See ``Contender``."""
        return Facts(f"vllm {vllm.__version__}", {})

    def decode(self, batch: int, steps: int, context: int) -> float:
        """See ``Contender``."""
        num_tokens = steps + batch + 2
        names = [self._add(decode_prompt(sequence, context), num_tokens) for sequence in range(batch)]
        while self._step() < batch:
            pass
        self._step()
        began_s = time.perf_counter()
        for _ in range(steps):
            num_outputs = self._step()
            assert num_outputs == batch, "every step decodes every sequence"
        took_s = time.perf_counter() - began_s
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return took_s

    def prefill(self, prompt: list[int]) -> float:
        """See ``Contender``."""
        began_s = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began_s

    def _add(self, prompt: list[int], num_tokens: int) -> str:
        name = f"request-{self._num_requests}"
        self._num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _step(self) -> int:
        """How many sequences got a token."""
        return len(self._engine.step())


if __name__ == "__main__":
    run_worker(Vllm)
