"""How fast a packed checkpoint is loaded: ``python -m bench.loading DIR --threads 2 --rounds 3 --json FILE``.

Each round writes as much memory as the files have bytes, and nothing else, gives it back, then loads the checkpoint
as the server does: read, hashed, compared with the manifest. Side by side they tell what limits a start. Memory that
no process has used for a while may have to come from a hypervisor first, at its own pace; ``--pause`` waits before
both of a round, so that a host that takes unused memory back has done so. Files are read once before the first
round: all figures are of a warm page cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from bench.measure import Machine
from bench.options import count, number
from mixtral_serve.kernels.pages import untouched
from mixtral_serve.kernels.registry import KernelsUnavailableError, choose
from mixtral_serve.model.checkpoint import Checkpoint, open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.loader import load_model

_PIECE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Round:
    """Gigabytes per second."""

    writing: float
    """Memory that is allocated as weights are, from all threads."""
    loading: float
    """The checkpoint, verified."""


def measure(
    directory: Path,
    *,
    rounds: int,
    pause_s: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Round]:
    """Load the packed checkpoint in ``directory`` so many times, with PyTorch's number of threads.

    Raises:
        CheckpointError: it is no packed checkpoint, or broken.
        KernelsUnavailableError: nothing here computes with its weights.
    """
    checkpoint = open_checkpoint(directory)
    manifest = checkpoint.manifest
    if manifest is None:
        raise CheckpointError(directory.name, "is not packed: mixtral-serve quantize does that")
    num_bytes = sum(_read(directory / name) for name in manifest.files)

    def rate(work: Callable[[], object]) -> float:
        sleep(pause_s)
        began_s = clock()
        made = work()
        took_s = clock() - began_s
        del made
        gc.collect()  # a model is cycles of modules
        return num_bytes / 1e9 / took_s

    load = _loader(checkpoint)
    return [Round(rate(lambda: untouched(num_bytes, dtype=torch.uint8).fill_(1)), rate(load)) for _ in range(rounds)]


def _loader(checkpoint: Checkpoint) -> Callable[[], object]:
    assert checkpoint.manifest is not None, "it is packed"
    kind, shape = checkpoint.manifest.weights, checkpoint.shape
    backend = choose(kind, "auto", dims=(shape.intermediate_size, shape.hidden_size))
    return lambda: load_model(checkpoint, kind, backend)


def _read(path: Path) -> int:
    """Into the page cache; its size."""
    piece = bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
        return file.tell()


def table(found: Sequence[Round]) -> str:
    """For people."""
    lines = [f"{'round':<8}{'writing memory':>16}{'loading':>12}   GB/s"]
    lines += [f"{index:<8}{one.writing:>16.2f}{one.loading:>12.2f}" for index, one in enumerate(found, 1)]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path, help="a packed checkpoint")
    parser.add_argument("--threads", type=count, default=2, help="files read at once (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="of both (default: %(default)s)")
    parser.add_argument(
        "--pause",
        metavar="SECONDS",
        type=number(0, 600),
        default=0.0,
        help="before each of both (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if the checkpoint cannot be loaded."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(min(options.threads, Machine.this().num_cpus))
    try:
        found = measure(options.directory, rounds=options.rounds, pause_s=options.pause)
    except (CheckpointError, KernelsUnavailableError) as error:
        print(f"bench.loading: {error}", file=sys.stderr)
        return 1
    print(table(found))
    if options.json is not None:
        figures = {
            "rounds": [asdict(one) for one in found],
            "parameters": {name: str(value) for name, value in vars(options).items() if name != "json"},
            "machine": asdict(Machine.this()),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
