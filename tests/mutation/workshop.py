"""Copies of the library, and the verdict of its tests on each.

A ``Workshop`` takes one snapshot of ``scheduler/``, its tests and its documents when it opens; whoever edits the
checkout meanwhile changes nothing. Each mutant is a copy of the snapshot in a folder of its own, and its tests import
nothing from elsewhere. They run quickest first and stop at the first failure. A mutant that runs for too long counts as
killed: the laws include that everything ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 90.0
LAW_EXAMPLES = "40"
PYTEST_INI = """[pytest]
addopts = --import-mode=importlib
filterwarnings = error
markers = slow: takes more than a few seconds
"""
LATE = {"test_documents.py": 1, "test_faults.py": 1, "test_step_cost.py": 1, "test_world.py": 1, "test_laws.py": 2}
"""Files that take longer than the examples; the laws last."""

Mutate = Callable[[Path], object]
"""Changes the ``scheduler/`` folder that it is given."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said about one copy."""

    name: str
    killed: bool
    by: str
    """The first test that failed, or why else it counts as killed."""
    seconds: float

    def report(self) -> None:
        """One line for people."""
        word = "killed  " if self.killed else "SURVIVED"
        sys.stdout.write(f"{word} {self.seconds:5.1f} s  {self.name}{f'  ({self.by})' if self.killed else ''}\n")
        sys.stdout.flush()


class Workshop:
    """Makes copies and judges them. Use it as a context manager."""

    def __enter__(self) -> Workshop:
        self._snapshot = Path(tempfile.mkdtemp(prefix="mutants-"))
        for name in ("scheduler", "tests/scheduler", "docs"):
            shutil.copytree(ROOT / name, self._snapshot / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self._snapshot / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._snapshot, ignore_errors=True)

    @property
    def library(self) -> Path:
        """The unchanged ``scheduler/``; only to be read."""
        return self._snapshot / "scheduler"

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A folder like the snapshot, gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        try:
            yield shutil.copytree(self._snapshot, folder, dirs_exist_ok=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def judge(self, name: str, mutate: Mutate) -> Verdict:
        """Mutate a copy and run its tests. Errors of ``mutate`` itself pass through."""
        began = perf_counter()
        with self.copy() as folder:
            mutate(folder / "scheduler")
            killed, by = _run_tests(folder)
        return Verdict(name, killed, by, perf_counter() - began)

    def judge_all(self, mutants: Sequence[tuple[str, Mutate]], *, num_workers: int) -> Iterator[Verdict]:
        """Verdicts in the order of ``mutants``, ``num_workers`` at a time."""
        with ThreadPoolExecutor(num_workers) as pool:
            yield from pool.map(lambda mutant: self.judge(*mutant), mutants)

    def judge_unchanged(self) -> None:
        """The library as it is must pass.

        Raises:
            SystemExit: it does not, so that no verdict would mean anything.
        """
        verdict = self.judge("the unchanged library", lambda _: None)
        if verdict.killed:
            raise SystemExit(f"the unchanged library fails its own tests: {verdict.by}")


def _run_tests(folder: Path) -> tuple[bool, str]:
    """Whether a test failed, and which."""
    files = sorted((folder / "tests/scheduler").rglob("test_*.py"), key=lambda file: (LATE.get(file.name, 0), file))
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(str(file.relative_to(folder)) for file in files)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # loading them takes longer than most mutants live
            "LAW_EXAMPLES": LAW_EXAMPLES,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True, "no end in sight"
    if process.returncode == 0:
        return False, ""
    named = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = named[0].split(" - ")[0].split(" ", 1)[1] if named else output.strip()[-200:]
    return True, by.removeprefix("tests/scheduler/")
