"""A worker as a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.peers.process import Worker, WorkerError, WorkerUnavailableError

Start = Callable[..., Worker]


def decode(batch: int) -> dict[str, dict[str, int]]:
    return {"decode": {"batch": batch, "steps": 2, "context": 1}}


def state_of(worker: Worker) -> str:
    """The letter that the system shows for the worker's process."""
    return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_answers_whatever_its_libraries_print(start_worker: Start, tmp_path: Path) -> None:
    worker = start_worker()
    assert worker.facts == {"version": "scripted", "details": {"threads": 2}}
    assert worker.ask(decode(1)) == {"seconds": 2.0, "tokens": 2}
    assert worker.ask({"prefill": {"tokens": 500, "serial": 1}}) == {"seconds": 0.5, "tokens": 500}
    assert worker.resident_bytes > 1_000_000
    log = (tmp_path / "logs" / "worker.log").read_text()
    assert "a library's banner" in log
    assert "child process" in log


def test_a_command_that_fails_leaves_the_worker_alive(start_worker: Start) -> None:
    worker = start_worker()
    with pytest.raises(WorkerError, match=r"^RuntimeError: cannot decode two$"):
        worker.ask(decode(2))
    assert worker.is_alive
    assert worker.ask(decode(1))["tokens"] == 2


@pytest.mark.parametrize(("batch", "words"), [(3, "exit code 3: out of luck"), (4, "killed by SIGKILL")])
def test_a_worker_that_dies_leaves_its_last_words(start_worker: Start, batch: int, words: str) -> None:
    worker = start_worker()
    with pytest.raises(WorkerError, match=words):
        worker.ask(decode(batch))
    assert not worker.is_alive
    with pytest.raises(WorkerError, match=words.partition(":")[0]):
        worker.ask(decode(1))


def test_a_silent_worker_is_ended(start_worker: Start) -> None:
    worker = start_worker(patience_s=20.0)
    worker.patience_s = 0.2
    with pytest.raises(WorkerError, match=r"no answer within 0\.2 s"):
        worker.ask(decode(5))
    assert not worker.is_alive


def test_what_cannot_be_loaded_is_told_apart_from_what_is_not_available(start_worker: Start) -> None:
    with pytest.raises(WorkerUnavailableError, match=r"^no such weights here$"):
        start_worker("unavailable")
    with pytest.raises(WorkerError, match=r"^ImportError: libfast\.so"):
        start_worker("broken")


def test_a_sleeping_worker_is_stopped_and_goes_on_when_woken(start_worker: Start) -> None:
    worker = start_worker()
    worker.sleep()
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(worker) == "T"
    worker.wake()
    assert worker.ask(decode(1))["tokens"] == 2


def test_a_sleeping_worker_can_be_ended(start_worker: Start) -> None:
    worker = start_worker()
    worker.sleep()
    worker.close()
    assert not worker.is_alive
