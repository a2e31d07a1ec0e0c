"""What would be installed, and what is read of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers.machine import instruction_sets, read_bandwidth
from bench.peers.setup import RECIPES, cuda_packages, main


def report(*names: str) -> dict[str, object]:
    return {"install": [{"metadata": {"name": name}} for name in names]}


def test_packages_of_cuda_are_noticed_before_anything_is_installed() -> None:
    assert cuda_packages(report("torch", "nvidia-cublas", "numpy", "CUDA-toolkit")) == ["CUDA-toolkit", "nvidia-cublas"]
    assert cuda_packages(report("torch", "triton")) == []


def test_every_recipe_names_exact_versions_of_its_peer() -> None:
    for recipe in RECIPES.values():
        assert "==" in recipe.packages[0]


def test_llama_cpp_is_compiled_without_amx_where_there_is_amx_and_as_ever_elsewhere() -> None:
    recipe = RECIPES["llama"]
    assert recipe.environment(["avx2", "avx512f"]) == recipe.variables
    assert recipe.environment(["avx2", "amx_int8"])["CMAKE_ARGS"].split() == [
        *recipe.variables["CMAKE_ARGS"].split(),
        "-DCMAKE_C_FLAGS=-mno-amx-int8",
        "-DCMAKE_CXX_FLAGS=-mno-amx-int8",
    ]
    assert RECIPES["vllm"].environment(["amx_int8"]) == {}


def test_an_unknown_peer_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tgi"])
    assert "there is no tgi; there are llama, transformers, vllm, openvino" in capsys.readouterr().err


def test_instruction_sets_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx512f fma avx2 sse\n\nprocessor\t: 1\n")
    assert instruction_sets(path) == ["avx2", "fma", "avx512f"]
    path.write_text("processor: 0\n")
    assert instruction_sets(path) == []
    assert instruction_sets(tmp_path / "absent") == []


def test_reading_memory_has_a_speed() -> None:
    assert read_bandwidth(1, num_bytes=1 << 24) > 1e8
