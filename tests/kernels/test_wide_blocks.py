"""Blocks of rows as only AMX has them, tried on any CPU: the program in ``wide_blocks.cpp`` says how."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "mixtral_serve/kernels/csrc"
UNDER_TEST = ("linear", "experts", "routing", "parallel", "products_portable")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow", "-fno-sanitize-recover")
"""Sizes are reckoned with pieces of a memory that begins at no address, which one check would take for a fault."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    path = tmp_path_factory.mktemp("wide") / "wide_blocks"
    sources = [str(KERNELS / f"{name}.cpp") for name in UNDER_TEST]
    flags = [*extension["extra-compile-args"], "-O1", *SANITIZERS, f"-I{KERNELS}"]
    command = [compiler, *flags, str(Path(__file__).with_name("wide_blocks.cpp")), *sources, "-o", str(path)]
    subprocess.run(command, check=True, timeout=240)
    return path


@pytest.mark.parametrize("operation", ["linear", "experts"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_wide_blocks_have_the_bits_of_narrow_ones_and_stay_in_their_memory(
    program: Path, operation: str, kind: str
) -> None:
    done = subprocess.run([program, operation, kind], check=False, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "150 cases\n"), done.stdout + done.stderr
