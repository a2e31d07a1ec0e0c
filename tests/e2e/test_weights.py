"""The demo model with packed weights, from the command line to the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_serve.kernels import native
from mixtral_serve.kernels.torch_backend import TorchBackend

has_native = pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
has_fbgemm = pytest.mark.skipif(TorchBackend().missing("int8") is not None, reason="this PyTorch has no FBGEMM")
QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 2 + 2?": "2 + 2 = 4",
    "Count from 1 to 5.": "1, 2, 3, 4, 5",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as people type it, to its end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_SERVE_")}
    command = [str(Path(sys.executable).parent / "mixtral-serve"), *arguments, "--port", "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=90.0, env=inherited, check=False)


@pytest.mark.parametrize(
    ("weights", "kernels", "law"),
    [
        pytest.param("int8", "native", "batchinvariant", marks=[has_native, pytest.mark.slow]),
        pytest.param("int4", "auto", "batchinvariant", marks=[has_native, pytest.mark.slow]),
        pytest.param("int8", "torch", "batchvariant", marks=[has_fbgemm, pytest.mark.slow]),
    ],
)
def test_the_demo_model_answers_with_packed_weights(
    new_server: Callable[..., Any], weights: str, kernels: str, law: str
) -> None:
    with new_server("--weights", weights, "--kernels", kernels) as server:
        client = server.client()
        model = client.models.list().data[0].id
        for question, expected in QUESTIONS.items():
            asked: Any = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(model=model, messages=asked, max_tokens=40, temperature=0)
            assert answer.choices[0].message.content == expected
        fingerprint = answer.system_fingerprint or ""
        assert fingerprint.startswith(f"mixtral-demo-{weights}-kvbf16-")
        assert fingerprint.endswith(law)
        assert f"weights ({weights})" in server.log
        assert server.log.count("kernels: ") == 1


@pytest.mark.slow
def test_int4_weights_without_the_compiled_kernels_are_refused_with_what_to_install() -> None:
    finished = run("serve", "--weights", "int4", "--kernels", "torch")
    assert finished.returncode == 78
    assert "int4 weights need the compiled kernels: install a C++ compiler" in finished.stderr + finished.stdout
    assert "Traceback" not in finished.stderr


def test_kernels_that_would_compute_nothing_are_refused_at_once() -> None:
    finished = run("serve", "--weights", "fp32", "--kernels", "native")
    assert finished.returncode == 78
    assert "kernels: native computes with int8 and int4 weights" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "exit_code"), [("reference", 0), ("torch", 78)])
def test_the_doctor_says_what_would_compute(kernels: str, exit_code: int) -> None:
    finished = run("doctor", "--weights", "int4", "--kernels", kernels)
    assert finished.returncode == exit_code, finished.stdout
    (line,) = [line for line in finished.stdout.splitlines() if " kernels " in line]
    assert line.startswith("ok" if exit_code == 0 else "FAIL")
    assert kernels in line
