"""What grammars cost a step: ``python -m bench.structured --json FILE``.

A slice of Mixtral-8x7B at its true width (2 of 32 layers, random int4 weights) decodes a full batch through the real
scheduler, engine core and runner, over Mixtral's own vocabulary. In turns none of the requests is constrained, and half
of them are, by a JSON schema that never ends. The turns alternate, so that whatever else the machine does falls on
both.

A slice exaggerates: masks and sampling cost a step as much as they would with all layers, the forward a sixteenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from bench.environment import run_as_engine
from bench.full_size.engine import LoadedEngine, build_engine, plan_engine
from bench.measure import Machine
from bench.mixtral_pieces import mixtral_token_bytes
from mixtral_serve.compose.known_models import KNOWN_MODELS
from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.core import EngineCore
from mixtral_serve.engine.messages import Submit
from mixtral_serve.model.threads import apply_threads, plan_threads
from mixtral_serve.settings import Settings
from mixtral_serve.text.detokenizer import TokenBytes
from mixtral_serve.text.grammar import json_schema_grammar
from scheduler.policies import POLICIES
from scheduler.scheduler import Scheduler

_MODEL: Final = "mixtral-8x7b"
_PROMPT_TOKENS: Final = 8
_WARM_UP_STEPS: Final = 4
_ENTRY: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "kind": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 10_000},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "count", "note"],
    "additionalProperties": False,
}
_SCHEMA: Final = {"type": "array", "items": _ENTRY, "minItems": 10_000}


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Decode steps of a full batch, seconds."""

    batch: int
    num_constrained: int
    num_layers: int
    num_threads: int
    num_turns: int
    free_s: float
    """Median over all steps of all turns without grammars."""
    constrained_s: float
    """The same with half of the rows constrained."""
    slowdown: float
    """Median over the pairs of turns of how much longer the constrained turn's median step took."""


def measure(engine: LoadedEngine, table: TokenBytes, *, batch: int, num_steps: int, num_turns: int) -> Slowdown:
    """Alternate turns without and with grammars."""
    free: list[list[float]] = []
    constrained: list[list[float]] = []
    for turn in range(num_turns):
        for num_constrained, found in ((0, free), (batch // 2, constrained))[:: 1 if turn % 2 else -1]:
            found.append(_turn(engine, table, batch=batch, num_constrained=num_constrained, num_steps=num_steps))
    return Slowdown(
        batch=batch,
        num_constrained=batch // 2,
        num_layers=engine.plan.shape.num_layers,
        num_threads=engine.num_threads,
        num_turns=num_turns,
        free_s=median(step for turn_steps in free for step in turn_steps),
        constrained_s=median(step for turn_steps in constrained for step in turn_steps),
        slowdown=median(median(with_) / median(without) for without, with_ in zip(free, constrained, strict=True)) - 1,
    )


def _turn(engine: LoadedEngine, table: TokenBytes, *, batch: int, num_constrained: int, num_steps: int) -> list[float]:
    """Seconds of each of ``num_steps`` steps in which all requests decode."""
    config = replace(engine.plan.config, max_num_seqs=batch, enable_prefix_caching=False)
    core = EngineCore(Scheduler(config, POLICIES["fcfs"]()), engine.runner, table)
    grammar = json_schema_grammar(_SCHEMA, after_space=True)
    core.handle(
        Submit(
            request_id=str(index),
            prompt=array("i", [3 + (index * 7919 + i * 31) % 30_000 for i in range(_PROMPT_TOKENS)]).tobytes(),
            arrival_s=0.0,
            max_tokens=num_steps * 4 + 64,
            ignore_eos=True,
            sampling=SamplingParams(seed=index),
            grammar=grammar if index < num_constrained else None,
        )
        for index in range(batch)
    )
    steps: list[float] = []
    while len(steps) < num_steps + _WARM_UP_STEPS:
        tick = core.tick()
        timing = None if tick is None else tick.timing
        if timing is not None and timing.num_tokens == timing.num_slices == batch:
            steps.append(timing.total_s)
    return steps[_WARM_UP_STEPS:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description="what grammars cost a step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of each turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=6, help="of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="clipped to what there is (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    options = parser.parse_args(arguments)
    apply_threads(plan_threads(options.threads))
    settings = Settings(model=_MODEL, weights="int4", threads=options.threads)
    began_s = time.monotonic()
    engine = build_engine(plan_engine(settings, KNOWN_MODELS[_MODEL], options.layers))
    print(f"{options.layers} layers after {time.monotonic() - began_s:.0f} s, {engine.num_threads} threads")
    table = mixtral_token_bytes()
    found = measure(engine, table, batch=options.batch, num_steps=options.steps, num_turns=options.turns)
    print(
        f"a step of {found.batch}: {found.free_s * 1e3:.1f} ms, with {found.num_constrained} constrained "
        f"{found.constrained_s * 1e3:.1f} ms: {found.slowdown:+.1%}"
    )
    options.json.write_text(json.dumps({"machine": asdict(Machine.this()), **asdict(found)}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_as_engine()
    sys.exit(main())
