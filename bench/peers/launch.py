"""Getting a contender ready: is it installed, is its model converted, start its worker.

Owns: ``Launcher``, the only place that knows which programs are run with which variables.

Our own worker waits without spinning, as the server makes its engine do. Peers keep their own default, whatever this
process was started with.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.peers.contenders import Entry, beyond, conversion_of, model_of, python_of
from bench.peers.process import Worker
from bench.peers.protocol import WorkerOptions
from bench.peers.results import Plan
from mixtral_serve.compose.server import ENGINE_ENVIRONMENT
from mixtral_serve.model.shape import ModelShape

_ROOT = Path(__file__).parents[2]


class Launcher:
    """Prepares and starts workers.

    Args:
        entries: all that may be asked for.
        plan: how large their caches must be.
        checkpoint: the slice.
        environments: directory of the virtual environments.
        logs: directory for what workers and conversions complain about.
        num_threads: of each worker.
        patience_s: see ``Worker``.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        plan: Plan,
        *,
        checkpoint: Path,
        environments: Path,
        logs: Path,
        num_threads: int,
        patience_s: float,
    ) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._plan = plan
        self._checkpoint = checkpoint
        self._environments = environments
        self._logs = logs
        self._num_threads = num_threads
        self._patience_s = patience_s

    def prepare(self, entry: Entry, shape: ModelShape, budget_bytes: int) -> str | None:
        """Convert the model for it, if that is not done. Returns why it cannot be measured, if so."""
        python = python_of(entry, self._environments)
        if not python.exists():
            return f"not installed: python -m bench.peers.setup {entry.environment}"
        module = conversion_of(entry, self._checkpoint)
        if not module or model_of(entry, self._checkpoint).exists():
            return None
        if entry.converter_bytes(shape) > budget_bytes:
            return f"not converted: {beyond(entry.converter_bytes(shape), budget_bytes)}"
        log = self._log(entry, "conversion")
        with log.open("wb") as output:
            done = subprocess.run(
                [python, "-m", *module], env=self._variables(entry), stdout=output, stderr=output, check=False
            )
        if done.returncode:
            last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            return f"failed: conversion: {' '.join(last) or f'exit code {done.returncode}'}"
        return None

    def start(self, name: str) -> Worker:
        """Its worker, loaded. Raises what ``Worker`` raises."""
        entry = self._entries[name]
        options = WorkerOptions(
            model=model_of(entry, self._checkpoint),
            variant=entry.variant,
            threads=self._num_threads,
            sequences=self._plan.most_sequences,
            positions=self._plan.most_positions,
        )
        python = python_of(entry, self._environments)
        return Worker(
            [str(python), "-m", f"bench.peers.workers.{entry.worker}", *options.arguments()],
            environment=self._variables(entry),
            log=self._log(entry, "worker"),
            patience_s=self._patience_s,
        )

    def _log(self, entry: Entry, what: str) -> Path:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self._logs / f"{entry.name.replace(' ', '-')}-{what}.log"

    def _variables(self, entry: Entry) -> dict[str, str]:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
        variables |= {
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": str(self._num_threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_CACHE_ROOT": str(self._checkpoint.with_name("vllm-cache")),  # what it compiles for this model
        }
        if entry.is_ours:
            variables |= ENGINE_ENVIRONMENT
        return variables
