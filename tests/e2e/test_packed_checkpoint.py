"""``mixtral-serve quantize`` as people type it, and a server that starts from what it made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.manifest import JOURNAL, MANIFEST
from mixtral_serve.model.packed_layout import ENDS_FILE, layer_file
from mixtral_serve.model.synthetic import DEMO_SIZED, write_synthetic_checkpoint

COMMAND = Path(sys.executable).parent / "mixtral-serve"
DEADLINE_S = 120.0

pytestmark = pytest.mark.slow


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_SERVE_")}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=inherited,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, packed by the command."""
    destination = tmp_path_factory.mktemp("packed") / "demo-int8"
    finished = run("quantize", "demo", destination, "--weights", "int8", "--workers", "1", "--revision", "demo-1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{destination}: int8, ")
    assert "source revision demo-1" in finished.stdout
    return destination


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "copy")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_doctor_finds_nothing_wrong_with_a_packed_checkpoint_and_plans_with_its_weights(whole: Path) -> None:
    finished = run("doctor", "--port", "0", "--model", whole)
    assert finished.returncode == 0, finished.stdout
    assert "weights (int8)" in finished.stdout


def test_doctor_verifies_every_byte_when_asked(packed: Path) -> None:
    verified = run("doctor", "--port", "0", "--model", packed, "--verify")
    assert verified.returncode == 0, verified.stdout
    assert "packed as int8 and verified" in verified.stdout
    flip(packed / layer_file(3), bit=8 * (packed / layer_file(3)).stat().st_size - 1)
    assert run("doctor", "--port", "0", "--model", packed).returncode == 0
    refused = run("doctor", "--port", "0", "--model", packed, "--verify")
    assert refused.returncode == 78
    assert f"{layer_file(3)}: is not the file that manifest.json lists" in refused.stdout


def test_weights_that_contradict_the_checkpoint_are_refused(whole: Path) -> None:
    finished = run("serve", "--port", "0", "--model", whole, "--weights", "int4")
    assert finished.returncode == 78
    assert "int4 contradicts the checkpoint, which is packed as int8" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("file", [MANIFEST, "config.json", "tokenizer.json", layer_file(2)])
def test_row54_row56_a_flipped_bit_is_refused_before_anything_starts(packed: Path, file: str) -> None:
    flip(packed / file, bit=8 * 40)
    finished = run("serve", "--port", "0", "--model", packed)
    assert finished.returncode == 78
    assert finished.stderr.startswith(f"mixtral-serve: {packed}: {file}: ")
    assert finished.stderr.count("\n") == 1


def test_row54_a_flipped_bit_in_the_weights_is_refused_before_the_server_is_ready(packed: Path) -> None:
    flip(packed / ENDS_FILE, bit=8 * (packed / ENDS_FILE).stat().st_size - 1)
    finished = run("serve", "--port", "0", "--threads", "1", "--model", packed)
    assert finished.returncode == 78
    assert f"{ENDS_FILE}: is not the file that manifest.json lists" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "is ready" not in finished.stdout


def test_row55_a_server_survives_the_truncation_of_its_files_and_answers_the_same(
    packed: Path, new_server: Callable[..., Any]
) -> None:
    def answer(server: Any) -> tuple[str, str]:
        client = server.client()
        said = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=32,
            temperature=0,
        )
        return said.choices[0].message.content, said.system_fingerprint

    with new_server("--model", str(packed)) as server:
        before = answer(server)
        assert "Paris" in before[0]
        assert "int8" in before[1]
        for file in packed.iterdir():
            os.truncate(file, 0)
        assert answer(server) == before
        server.wait_until_quiet()
        assert "loaded and verified copy as int8" in server.log


def test_a_source_that_cannot_be_packed_exits_with_78_and_names_the_file(tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint_path(), tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    finished = run("quantize", broken, tmp_path / "packed", "--weights", "int4")
    assert finished.returncode == 78
    assert finished.stderr == f"mixtral-serve: {broken}: tokenizer.json: is missing\n"
    assert not (tmp_path / "packed").exists()


def test_a_destination_that_cannot_be_written_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finished = run("quantize", "demo", tmp_path / "file" / "packed", "--weights", "int4")
    assert finished.returncode == 1
    assert finished.stderr.startswith("mixtral-serve: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [[], ["--weights", "bf16"], ["--weights", "int4", "--workers", "0"], ["--weights", "int4", "--no-such-flag"]],
)
def test_a_wrong_command_line_exits_with_2(flags: list[str]) -> None:
    finished = run("quantize", "demo", "packed", *flags)
    assert finished.returncode == 2
    assert "usage: mixtral-serve" in finished.stderr


def test_row57_ctrl_c_exits_with_130_and_the_same_command_continues(tmp_path: Path) -> None:
    shape = replace(DEMO_SIZED, hidden_size=1024, intermediate_size=2048, num_layers=5)
    write_synthetic_checkpoint(tmp_path / "source", shape)
    command = ["quantize", str(tmp_path / "source"), str(tmp_path / "packed"), "--weights", "int4", "--workers", "1"]
    with subprocess.Popen([str(COMMAND), *command], stderr=subprocess.PIPE, text=True) as process:
        deadline_s = time.monotonic() + DEADLINE_S
        while not (tmp_path / "packed" / layer_file(0)).exists():
            assert process.poll() is None, "it ended too early"
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert said.endswith("mixtral-serve: interrupted; the same command continues\n")
    assert "Traceback" not in said
    assert (tmp_path / "packed" / JOURNAL).exists()
    refused = run("serve", "--port", "0", "--model", tmp_path / "packed")
    assert refused.returncode == 78
    assert f"{MANIFEST}: is missing: quantize has not finished here" in refused.stderr
    continued = run(*command)
    assert continued.returncode == 0
    assert " of 6 files are finished" in continued.stderr
    undisturbed = run("quantize", tmp_path / "source", tmp_path / "whole", "--weights", "int4")
    assert undisturbed.returncode == 0
    packed, whole = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("packed", "whole"))
    assert packed == whole
