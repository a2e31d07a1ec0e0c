"""Ourselves against the other CPU servers: ``python -m bench.peers --layers 2 --json FILE``.

Makes a random Mixtral of true width and few layers, converts it for every server that is installed, and measures decode
steps at several batches and a fresh prompt, in turns, in one run. Peers are set up by ``python -m bench.peers.setup``;
one that is missing or fails is a line of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench.measure import Machine
from bench.peers.chart import draw
from bench.peers.contenders import CONTENDERS, Entry, SelectionError, residents, select
from bench.peers.launch import Launcher
from bench.peers.machine import instruction_sets, read_bandwidth
from bench.peers.report import figures, table
from bench.peers.results import Plan, Results, Row
from bench.peers.rounds import Fleet, held, measure
from bench.peers.slice import prepared_slice, slice_shape
from mixtral_serve.machine import machine_memory

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "peers"
_SHARE_OF_MEMORY = 0.8
_CAUTIOUS_BYTES = 8_000_000_000
"""Where the system does not tell what is free."""


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part)
    if any(size < 1 for size in sizes):
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return sizes


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="contenders: " + ", ".join(entry.name for entry in CONTENDERS),
    )
    add = parser.add_argument
    add("--layers", type=_positive, default=2, help="layers of the model (default: %(default)s)")
    add("--batches", type=_sizes, default=(1, 4, 16, 64), help="sequences that decode at once (default: 1,4,16,64)")
    add("--prefill", type=_sizes, default=(512,), help="lengths of fresh prompts (default: 512; empty: none)")
    add("--rounds", type=_positive, default=3, help="how often everything is measured (default: %(default)s)")
    add("--context", type=_positive, default=17, help="prompt of a decoding sequence, tokens (default: %(default)s)")
    add("--seconds", type=float, default=2.0, help="of one decode measurement, about (default: %(default)s)")
    add("--threads", type=_positive, default=Machine.this().num_cpus, help="of each contender (default: all CPUs)")
    add("--only", action="append", default=[], metavar="WORD", help="contenders with this in their name; repeatable")
    add("--memory-bytes", type=_positive, metavar="N", help="for all workers at once (default: 80 %% of what is free)")
    add("--patience", type=float, default=900.0, metavar="SECONDS", help="for loading and each answer (default: 900)")
    add("--work-dir", type=Path, default=ENVIRONMENTS / "work", help="models and logs (default: build/peers/work)")
    add("--environments", type=Path, default=ENVIRONMENTS, help="where the peers are installed (default: build/peers)")
    add("--lock", type=Path, metavar="FILE", help="hold this file's lock while measuring, as flock(1) does")
    add("--json", type=Path, metavar="FILE", help="write the figures here, after every round")
    add("--plot", type=Path, metavar="FILE", help="draw them here (PNG)")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    rows = [Row("decode", size) for size in options.batches] + [Row("prefill", size) for size in options.prefill]
    return Plan(tuple(rows), options.rounds, options.context, options.seconds)


def _run(options: argparse.Namespace, plan: Plan, entries: Sequence[Entry]) -> Results:
    """Prepare, then measure; what cannot be measured stands in the results."""
    shape = slice_shape(options.layers)
    budget = options.memory_bytes or _free_memory_bytes()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    with held(options.lock, shared=True):
        checkpoint = prepared_slice(options.work_dir, options.layers)
        launcher = Launcher(
            entries,
            plan,
            checkpoint=checkpoint,
            environments=options.environments,
            logs=options.work_dir / "logs",
            num_threads=options.threads,
            patience_s=options.patience,
        )
        reasons = {entry.name: launcher.prepare(entry, shape, budget) for entry in entries}
    unready = {name: reason for name, reason in reasons.items() if reason is not None}
    needs = {entry.name: entry.memory_bytes(shape) for entry in entries if entry.name not in unready}
    staying, refused = residents(needs, budget)
    ready = [name for name in needs if name not in refused]
    _note(f"memory for workers: {budget / 1e9:.1f} GB; loaded throughout: {', '.join(sorted(staying)) or 'nobody'}")
    fleet = Fleet(launcher.start, staying)
    try:
        results = measure(
            plan,
            ready,
            fleet,
            read_bandwidth=lambda: read_bandwidth(options.threads),
            lock=options.lock,
            note=_note,
            on_round=lambda so_far: _write(options, plan, entries, so_far),
        )
    finally:
        fleet.close()
    results.failures |= unready | refused
    _write(options, plan, entries, results)
    return results


def _write(options: argparse.Namespace, plan: Plan, entries: Sequence[Entry], results: Results) -> None:
    """The figures so far, if a file for them was named."""
    if options.json is not None:
        found = _facts(options) | figures(plan, entries, results)
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


def _free_memory_bytes() -> int:
    """What the workers may take when nobody says."""
    memory = machine_memory()
    return _CAUTIOUS_BYTES if memory is None else int(_SHARE_OF_MEMORY * memory.available_bytes)


def _note(line: str) -> None:
    print(f"bench.peers: {line}", file=sys.stderr, flush=True)


def _facts(options: argparse.Namespace) -> dict[str, object]:
    """Where and how it was measured."""
    parameters = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {
        "parameters": parameters,
        "slice": asdict(slice_shape(options.layers)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(Machine.this()) | {"instruction_sets": instruction_sets()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0 when it could be measured, whatever came out and whoever was missing."""
    options = _parser().parse_args(arguments)
    # Threads of this process shall not spin beside whoever is measured. Read when PyTorch starts its threads.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        entries = select(options.only)
    except SelectionError as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 2
    plan = _plan(options)
    # A worker that sleeps does not notice that this process is gone: end as if interrupted, which ends them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = _run(options, plan, entries)
    print(table(plan, entries, results))
    if options.plot is not None:
        title = f"Mixtral of true width, {options.layers} layers, {options.threads} threads, {Machine.this().cpu}"
        draw(options.plot, plan, entries, results, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
