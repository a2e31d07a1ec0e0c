"""How long one ``step`` plus ``commit`` of the scheduler takes, and that it does not grow with who waits.

    python -m bench.scheduler_step --running 256 --waiting 10000 --json FILE

All seats are taken by requests that decode, a queue of fresh prompts waits behind them. Only the scheduler is timed:
the results that a model would give are made outside the clock. Beside the asked point a small table shows the growth
over both numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from bench.measure import Machine, Quantiles
from scheduler import (
    FCFSPolicy,
    Request,
    RequestId,
    Scheduler,
    SchedulerConfig,
    SliceResult,
    StepPlan,
    StepResult,
    StopRule,
)

BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 64
NUM_WARM_UP_STEPS = 20
TABLE_RUNNING = (64, 256)
TABLE_WAITING = (0, 100, 1000, 10_000)


def a_request(name: str, seed: int, num_prompt_tokens: int, max_tokens: int) -> Request:
    """A prompt that shares no prefix with any other."""
    prompt = array("i", [seed % 30_000, seed // 30_000, *range(2, num_prompt_tokens)])
    return Request(id=RequestId(name), prompt=prompt, stop=StopRule(max_tokens), arrival_s=0.0)


def result_of(plan: StepPlan) -> StepResult:
    """What a model would answer: a token from every slice that samples."""
    return StepResult(tuple(SliceResult(s.request_id, 7 if s.samples else None) for s in plan.slices))


def busy_scheduler(num_running: int, num_waiting: int, num_steps: int) -> Scheduler:
    """All seats taken by requests that decode and outlast the measurement; ``num_waiting`` wait."""
    # Lengths differ, so that in each step a sixteenth of the requests fills a block, as in a real mix.
    num_tokens = NUM_PROMPT_TOKENS + 2 * BLOCK_SIZE + num_steps + 2 * NUM_WARM_UP_STEPS + num_running
    config = SchedulerConfig(
        num_blocks=1 + num_running * (num_tokens // BLOCK_SIZE + 1),
        block_size=BLOCK_SIZE,
        max_num_seqs=num_running,
        max_num_batched_tokens=max(2048, num_running),
        max_waiting=num_running + num_waiting,
    )
    scheduler = Scheduler(config, FCFSPolicy())
    for index in range(num_running):
        num_prompt_tokens = NUM_PROMPT_TOKENS + index % BLOCK_SIZE
        max_tokens = num_tokens - num_prompt_tokens
        scheduler.add(a_request(f"running-{index}", index, num_prompt_tokens, max_tokens), 0.0)
    while scheduler.stats().num_waiting:
        scheduler.commit(result_of(scheduler.step(0.0)), 0.0)
    for index in range(num_waiting):
        scheduler.add(a_request(f"waiting-{index}", num_running + index, NUM_PROMPT_TOKENS, 128), 0.0)
    return scheduler


def measure_steps(num_running: int, num_waiting: int, num_steps: int) -> list[float]:
    """Seconds of ``step`` plus ``commit``, for each of ``num_steps`` steps after a warm-up."""
    scheduler = busy_scheduler(num_running, num_waiting, num_steps)
    durations_s = []
    for _ in range(NUM_WARM_UP_STEPS + num_steps):
        began = perf_counter()
        plan = scheduler.step(0.0)
        planned = perf_counter()
        result = result_of(plan)
        answered = perf_counter()
        scheduler.commit(result, 0.0)
        durations_s.append(perf_counter() - answered + planned - began)
    assert len(plan.slices) == num_running, "everybody decodes in every step"
    return durations_s[NUM_WARM_UP_STEPS:]


def growth_table(num_steps: int) -> list[dict[str, float]]:
    """Median and tail for every pair of the table's numbers."""
    rows: list[dict[str, float]] = []
    points = [(running, waiting) for running in TABLE_RUNNING for waiting in TABLE_WAITING]
    for num_running, num_waiting in tqdm(points, desc="growth", disable=not sys.stderr.isatty()):
        step_s = Quantiles.of(measure_steps(num_running, num_waiting, num_steps))
        rows.append(
            {"running": num_running, "waiting": num_waiting, "p50_s": step_s.p50 or 0.0, "p95_s": step_s.p95 or 0.0}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256, help="requests that decode in every step")
    parser.add_argument("--waiting", type=int, default=10_000, help="requests that wait")
    parser.add_argument("--steps", type=int, default=300, help="steps to measure")
    parser.add_argument("--no-table", action="store_true", help="measure the asked point only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if min(options.running, options.steps) < 1 or options.waiting < 0:
        parser.error("--running and --steps are at least 1, --waiting at least 0")
    step_s = Quantiles.of(measure_steps(options.running, options.waiting, options.steps))
    print(f"step + commit, {options.running} running, {options.waiting} waiting:")
    print(f"  p50 {1e3 * (step_s.p50 or 0):.3f} ms   p95 {1e3 * (step_s.p95 or 0):.3f} ms   ({options.steps} steps)")
    table = [] if options.no_table else growth_table(options.steps)
    if table:
        print("\n  running  waiting    p50 ms    p95 ms")
        for row in table:
            print(f"  {row['running']:7}  {row['waiting']:7}  {1e3 * row['p50_s']:8.3f}  {1e3 * row['p95_s']:8.3f}")
    if options.json is not None:
        figures = {
            "step_s": asdict(step_s),
            "running": options.running,
            "waiting": options.waiting,
            "steps": options.steps,
            "growth": table,
            "machine": asdict(Machine.this()),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
