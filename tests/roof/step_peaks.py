"""Measures how much memory steps of a real model take: ``step_peaks.py CHECKPOINT WEIGHTS KERNELS``.

Prints one JSON object per kind of step: the bound, and by how much resident anonymous memory grew at most while a
step of that kind ran, in bytes. Pages of libraries that are touched for the first time are not counted.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mixtral_serve.compose.memory import step_bytes
from mixtral_serve.contract import RunBatch, SamplingParams
from mixtral_serve.model.config_file import read_shape
from mixtral_serve.model.runner import MixtralRunner, Numerics, load_runner
from scheduler.config import SchedulerConfig
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.request import Request, RequestId, StopRule
from scheduler.scheduler import Scheduler

NUM_BLOCKS = 800
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
GREEDY = SamplingParams(temperature=0.0)
HOT = SamplingParams(
    temperature=50.0,
    top_p=0.99,
    min_p=1e-12,
    logprobs=20,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
)
SCORED = SamplingParams(temperature=0.0, prompt_logprobs=20)


def status() -> dict[str, int]:
    """Fields of the kernel's account of this process, in bytes."""
    text = Path("/proc/self/status").read_text()
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def peak_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """By how much resident memory grew while ``run`` ran, and its result."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status()
    result = run()
    after = status()
    grown_files = max(0, after["RssFile"] - before["RssFile"])
    return after["VmHWM"] - before["VmRSS"] - grown_files, result


def measure(runner: MixtralRunner, requests: Sequence[Request], sampling: SamplingParams, max_rows: int) -> list[Any]:
    """Run the requests; (peak, rows, slices) of each step."""
    config = SchedulerConfig(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=max_rows,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
    )
    scheduler = Scheduler(config, FCFSPolicy())
    for request in requests:
        scheduler.add(request, 0.0)
    steps = []
    while scheduler.has_work:
        plan = scheduler.step(0.0)
        batch = RunBatch(plan, (sampling,) * len(plan.slices))
        peak, result = peak_of(lambda batch=batch: runner.run(batch))  # type: ignore[misc]
        assert all(outcome.error is None for outcome in result.results), "a step failed"
        scheduler.commit(result, 0.0)
        steps.append((peak, plan.num_tokens, len(plan.slices)))
    return steps


def requests_of(
    count: int, num_tokens: int, max_tokens: int, *, vocab_size: int, scored: bool = False
) -> list[Request]:
    """Random prompts."""
    random = Random(num_tokens)
    prompts = [array("i", (random.randrange(3, vocab_size) for _ in range(num_tokens))) for _ in range(count)]
    return [
        Request(RequestId(f"r{i}"), prompt, StopRule(max_tokens), 0.0, prompt_logprobs=scored)
        for i, prompt in enumerate(prompts)
    ]


def main(checkpoint: Path, weights: Any, kernels: Any) -> None:
    shape = read_shape(checkpoint)
    numerics = Numerics(weights=weights, kernels=kernels)
    runner = load_runner(checkpoint, numerics, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_threads=2)
    vocab = shape.vocab_size
    measure(runner, requests_of(2, 8, 3, vocab_size=vocab), GREEDY, 64)  # what is loaded on first use is loaded now
    kinds = {
        "large prefill": (requests_of(1, 2048, 1, vocab_size=vocab), GREEDY, 2048),
        "prefill in chunks": (requests_of(1, 4000, 1, vocab_size=vocab), GREEDY, 512),
        "many decodes": (requests_of(64, 100, 3, vocab_size=vocab), GREEDY, 512),
        "filtered draws": (requests_of(64, 16, 3, vocab_size=vocab), HOT, 512),
        "scored prompt": (requests_of(1, 512, 1, vocab_size=vocab, scored=True), SCORED, 512),
    }
    for kind, (requests, sampling, max_rows) in kinds.items():
        for peak, num_rows, num_slices in measure(runner, requests, sampling, max_rows):
            bound = step_bytes(
                shape,
                weights,
                num_rows=num_rows,
                num_sampled=num_slices,
                num_context_tokens=num_slices * MAX_MODEL_LEN,
            )
            sys.stdout.write(json.dumps({"kind": kind, "bound": bound, "peak": peak, "rows": num_rows}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
