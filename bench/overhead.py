"""What serving costs besides the model: ``python -m bench.overhead --json FILE``.

First everything outside the forward of a decode step, part by part, around a model that computes nothing. Then the
step of a random Mixtral, long enough to matter, with as many live HTTP streams as requests run, against the
engine alone: the same work, in turns, in one run.

The temporary checkpoint takes some 60 MB per layer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.environment import run_as_engine
from bench.live_streams import LiveStreams, OverheadError, measure_live_streams, model_shape
from bench.measure import Machine
from bench.outside_forward import SAMPLINGS, StepCost, measure_outside_forward
from mixtral_serve.engine.memory import settle_heap
from mixtral_serve.model.synthetic import write_synthetic_checkpoint

LEAST_STEP_S = 0.05
"""A shorter step does not stand for a model of true width."""
MOST_RATIO = 1.10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--running", type=int, default=64, help="requests that run at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps measured outside the forward (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="phases with live streams (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=48, help="steps of a phase, about (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random model (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="threads of the model, clipped to what there is")
    parser.add_argument("--skip-streams", action="store_true", help="leave out the second part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def _streams(options: argparse.Namespace) -> LiveStreams:
    with tempfile.TemporaryDirectory(prefix="overhead-") as directory:
        checkpoint = Path(directory) / "random"
        write_synthetic_checkpoint(checkpoint, model_shape(options.layers))
        return asyncio.run(
            measure_live_streams(
                checkpoint,
                num_running=options.running,
                rounds=options.rounds,
                output_tokens=options.output_tokens,
                threads=options.threads,
            )
        )


def figures(options: argparse.Namespace, costs: dict[str, StepCost], streams: LiveStreams | None) -> dict[str, object]:
    """The JSON."""
    found: dict[str, object] = {
        "outside_forward_s": costs["greedy"].total_s,
        "outside_forward_sampled_s": costs["sampled"].total_s,
        "parts_s": {name: dict(cost.parts_s) for name, cost in costs.items()},
        "running": options.running,
    }
    if streams is not None:
        found |= {
            "step_s": {"alone": streams.step_alone_s, "streams": streams.step_streams_s},
            "ratio": streams.ratio,
            "is_step_long_enough": streams.step_alone_s >= LEAST_STEP_S,
            "live_streams": asdict(streams),
        }
    parameters = {name: value for name, value in vars(options).items() if name != "json"}
    return found | {
        "parameters": parameters,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(Machine.this()),
    }


def table(running: int, costs: dict[str, StepCost], streams: LiveStreams | None) -> str:
    """For people."""
    lines = [f"outside the forward, {running} running, ms per step", f"{'':<22}" + "".join(f"{n:>12}" for n in costs)]
    lines += [
        f"{part:<22}" + "".join(f"{cost.parts_s[part] * 1e3:>12.3f}" for cost in costs.values())
        for part in costs["greedy"].parts_s
    ]
    lines.append(f"{'sum':<22}" + "".join(f"{cost.total_s * 1e3:>12.3f}" for cost in costs.values()))
    if streams is not None:
        lines += [
            "",
            f"a step with {running} live HTTP streams against the engine alone, {streams.num_steps} steps",
            f"{'alone':<22}{streams.step_alone_s * 1e3:>12.1f} ms",
            f"{'with streams':<22}{streams.step_streams_s * 1e3:>12.1f} ms",
            f"{'ratio':<22}{streams.ratio:>12.3f}  (at most {MOST_RATIO:.2f};"
            f" by phase: {', '.join(f'{ratio:.3f}' for ratio in streams.ratios)})",
            f"{'ratio of the runner':<22}{streams.run_ratio:>12.3f}",
            f"{'ratio of periods':<22}{streams.period_ratio:>12.3f}",
            f"{'API process':<22}{streams.api_cpu_per_step_streams_s * 1e3:>12.1f} ms of processor time per step",
        ]
        if streams.step_alone_s < LEAST_STEP_S:
            lines.append(f"the step is shorter than {LEAST_STEP_S * 1e3:.0f} ms: add layers")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0 when it could be measured, whatever came out."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(min(options.threads, Machine.this().num_cpus))
    costs = {name: measure_outside_forward(options.running, options.steps, s) for name, s in SAMPLINGS.items()}
    try:
        streams = None if options.skip_streams else _streams(options)
    except OverheadError as error:
        print(f"bench.overhead: {error}", file=sys.stderr)
        return 1
    print(table(options.running, costs, streams))
    if options.json is not None:
        options.json.write_text(json.dumps(figures(options, costs, streams), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    run_as_engine()
    settle_heap()  # as the engine does when it has loaded
    sys.exit(main())
