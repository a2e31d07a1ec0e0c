"""Workers for the tests of the comparison with peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.peers.process import Worker
from bench.peers.protocol import WorkerOptions

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """``start_worker(variant, patience_s=60)``: a real process; all are ended with the test."""
    started: list[Worker] = []

    def start(variant: str = "plain", patience_s: float = 60.0) -> Worker:
        options = WorkerOptions(model=tmp_path, variant=variant, threads=2, sequences=64, positions=600)
        worker = Worker(
            [sys.executable, str(Path(__file__).with_name("worker_for_tests.py")), *options.arguments()],
            environment=os.environ | {"PYTHONPATH": str(ROOT)},
            log=tmp_path / "logs" / "worker.log",
            patience_s=patience_s,
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()
