"""A program that measures the engine's work runs as the engine does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mixtral_serve.compose.server import ENGINE_ENVIRONMENT

PROGRAM = """
import os, sys
from bench.environment import run_as_engine
run_as_engine()
print(sys.argv[1:], [os.environ[name] for name in sys.argv[1:]], os.environ["KEPT"])
"""


def test_it_starts_over_with_its_arguments_and_the_engines_environment() -> None:
    names = list(ENGINE_ENVIRONMENT)
    inherited = {name: value for name, value in os.environ.items() if name not in ENGINE_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env=inherited | {"OMP_WAIT_POLICY": "ACTIVE", "KEPT": "yes"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{names} {list(ENGINE_ENVIRONMENT.values())} yes\n"
