"""Copies of the library, and the verdict of its tests on each.

A mutant lives in a folder of its own that holds ``scheduler/``, ``tests/scheduler/`` and what those read; nothing of
the checkout is imported. The tests run quickest first and stop at the first failure. A mutant that runs for too
long counts as killed: the laws include that everything ends.
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests said about one copy."""

    name: str
    killed: bool
    by: str
    """The first test that failed, or why else it counts as killed."""
    seconds: float


@contextmanager
def copy_of_the_library() -> Iterator[Path]:
    """A folder with the library and its tests; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    try:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in ("scheduler", "tests/scheduler", "docs"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        (folder / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_files(folder: Path) -> list[str]:
    """The tests' files, the laws last: examples are quick, and name the fault."""
    files = sorted((folder / "tests/scheduler").rglob("test_*.py"))
    late = {"test_laws.py": 2, "test_documents.py": 1, "test_faults.py": 1, "test_step_cost.py": 1, "test_world.py": 1}
    files.sort(key=lambda file: late.get(file.name, 0))
    return [str(file.relative_to(folder)) for file in files]


def judge(name: str, mutate: Callable[[Path], None]) -> Verdict:
    """Mutate a copy and run its tests. Errors of ``mutate`` itself pass through."""
    began = perf_counter()
    with copy_of_the_library() as folder:
        mutate(folder / "scheduler")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # loading them takes longer than most mutants live
            "LAW_EXAMPLES": LAW_EXAMPLES,
        }
        process = subprocess.Popen(
            [*command, *test_files(folder)],
            cwd=folder,
            env=environment,
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
            return Verdict(name, True, "no end in sight", perf_counter() - began)
    seconds = perf_counter() - began
    if process.returncode == 0:
        return Verdict(name, False, "", seconds)
    named = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Verdict(name, True, named[0].split(" - ")[0] if named else output.strip()[-200:], seconds)


def judge_all(mutants: Sequence[tuple[str, Callable[[Path], None]]], *, num_workers: int) -> Iterator[Verdict]:
    """Verdicts in the order of ``mutants``, ``num_workers`` at a time."""
    with ThreadPoolExecutor(num_workers) as pool:
        yield from pool.map(lambda mutant: judge(*mutant), mutants)


def report(verdict: Verdict) -> None:
    """One line per mutant, and the test that killed it."""
    word = "killed  " if verdict.killed else "SURVIVED"
    by = f"  ({verdict.by.removeprefix('FAILED ').removeprefix('tests/scheduler/')})" if verdict.killed else ""
    sys.stdout.write(f"{word} {verdict.seconds:5.1f} s  {verdict.name}{by}\n")
    sys.stdout.flush()
