"""Mixtral at true size on weights made in memory: ``python -m bench.full_size --weights int4 --seconds 480``.

Builds the model with synthetic packed weights, plans its memory under the cap as the server does, and measures through
the real engine: anonymous memory, a grid of step times, bursts of requests, the rates that the grid predicts to be
answered in time, and one of them under load. With fewer layers than the model's (``--layers``) everything is measured
on those, and the whole model is extrapolated from them.

Ends within ``--seconds``. Exit code 78 where the memory does not suffice; nothing was allocated then.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

from bench.environment import run_as_engine
from bench.full_size.allowance import Allowance, NoTimeError, process_began_s
from bench.full_size.engine import EnginePlan, plan_engine
from bench.full_size.extrapolation import Target
from bench.full_size.figures import figures
from bench.full_size.measurement import measure
from bench.full_size.report import table
from bench.options import count, number
from mixtral_serve.compose.known_models import KNOWN_MODELS
from mixtral_serve.engine.errors import EXIT_CONFIG
from mixtral_serve.kernels.names import KernelChoice
from mixtral_serve.kernels.native import NativeUnavailableError
from mixtral_serve.kernels.registry import KernelsUnavailableError
from mixtral_serve.model.threads import apply_threads, plan_threads
from mixtral_serve.settings import Settings
from scheduler.errors import ConfigError, PlanError

TARGETS: Final = ("8:40", "8:80", "8:160", "16:200", "16:400")
EXIT_NO_TIME: Final = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0 when it could be measured, whatever came out."""
    options = _parser().parse_args(arguments)
    options.target = options.target or [Target.parse(text) for text in TARGETS]
    allowance = Allowance(options.seconds, began_s=process_began_s())
    apply_threads(plan_threads(options.threads))
    try:
        plan = _plan(options)
        found = measure(plan, allowance, targets=options.target, seed=options.seed, say=_say)
    except (ConfigError, PlanError, KernelsUnavailableError, NativeUnavailableError) as error:
        print(f"bench.full_size: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except NoTimeError:
        print(f"bench.full_size: {options.seconds:g} s do not suffice for making the weights", file=sys.stderr)
        return EXIT_NO_TIME
    print(table(found))
    if options.json is not None:
        parameters = vars(options) | {"json": str(options.json), "target": [str(target) for target in options.target]}
        options.json.write_text(json.dumps(figures(found, allowance, parameters), indent=2) + "\n", "utf-8")
    return 0


def _plan(options: argparse.Namespace) -> EnginePlan:
    full_shape = KNOWN_MODELS[options.model]
    settings = Settings(
        model=options.model,
        weights=options.weights,
        kernels=options.kernels,
        kv_cache_dtype=options.kv_cache_dtype,
        threads=options.threads,
        memory_cap_bytes=options.memory_cap_bytes,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
    )
    num_layers = options.layers or full_shape.num_layers
    if num_layers > full_shape.num_layers:
        raise ConfigError("layers", f"the model has {full_shape.num_layers}, got {num_layers}")
    return plan_engine(settings, full_shape, num_layers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description=(__doc__ or "").partition("\n\n")[0])
    default = Settings()
    parser.add_argument("--model", choices=KNOWN_MODELS, default="mixtral-8x7b", help="default: %(default)s")
    parser.add_argument("--layers", type=count, metavar="N", help="fewer layers than the model's (default: all)")
    parser.add_argument("--weights", choices=("int4", "int8"), default="int4", help="default: %(default)s")
    parser.add_argument("--kernels", choices=get_args(KernelChoice), default="auto", help="default: %(default)s")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp32", "bf16", "int8"), default="auto")
    parser.add_argument("--threads", type=count, default=default.threads, help="clipped to what there is (default: 8)")
    parser.add_argument("--seconds", type=number(30, 86_400), default=480.0, help="for all (default: 480, least: 30)")
    parser.add_argument(
        "--memory-cap-bytes", type=count, default=default.memory_cap_bytes, help="as the server's (default: 90 GB)"
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=count,
        default=0,
        help="most memory for the KV cache (default: what the cap leaves; with fewer layers, what the grid needs)",
    )
    parser.add_argument(
        "--target",
        type=_target,
        action="append",
        metavar="CORES:GBPS",
        help=f"a machine to extrapolate to; may be repeated (default: {' '.join(TARGETS)})",
    )
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and prompts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser


def _target(text: str) -> Target:
    try:
        return Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _say(text: str) -> None:
    print(f"bench.full_size: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_as_engine()
    sys.exit(main())
