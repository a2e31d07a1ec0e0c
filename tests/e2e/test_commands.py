"""The command as people type it: what it prints, and the exit codes of starts that cannot succeed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import mixtral_serve
from mixtral_serve.demo import checkpoint_path

COMMAND = Path(sys.executable).parent / "mixtral-serve"


def run(*arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIXTRAL_SERVE_")}
    return subprocess.run(
        [str(COMMAND), *arguments],
        capture_output=True,
        text=True,
        timeout=90.0,
        env=inherited | dict(variables or {}),
        check=False,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    copy = tmp_path / "damaged"
    shutil.copytree(checkpoint_path(), copy)
    return copy


def assert_one_line(finished: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line for people on standard error (log lines of a process that had begun aside), and no traceback."""
    assert "Traceback" not in finished.stderr
    lines = [line for line in finished.stderr.splitlines() if all(word in line for word in words)]
    assert lines, finished.stderr


def test_the_version() -> None:
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"mixtral-serve {mixtral_serve.__version__}\n")


def test_print_config_names_each_source() -> None:
    finished = run("serve", "--print-config", "--port", "18000", variables={"MIXTRAL_SERVE_MAX_NUM_SEQS": "7"})
    assert finished.returncode == 0
    lines = {line.split()[0]: line.split("=", 1)[1].split() for line in finished.stdout.splitlines()}
    assert lines["port"] == ["18000", "#", "flag"]
    assert lines["max_num_seqs"] == ["7", "#", "environment"]
    assert lines["host"][-1] == "default"


def test_doctor_finds_nothing_wrong_with_the_demo() -> None:
    finished = run("doctor", "--port", "0")
    assert finished.returncode == 0, finished.stdout
    assert "FAIL" not in finished.stdout
    assert "memory plan" in finished.stdout


@pytest.mark.slow
def test_doctor_fails_where_serving_would() -> None:
    finished = run("doctor", "--model", "/nonexistent")
    assert finished.returncode == 78
    assert "/nonexistent" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "name"),
    [
        (["--max-num-seqs", "0"], {}, "max_num_seqs"),
        (["--no-such-flag"], {}, "--no-such-flag"),
        ([], {"MIXTRAL_SERVE_NO_SUCH": "1"}, "MIXTRAL_SERVE_NO_SUCH"),
        (["--port", "http"], {}, "port"),
    ],
)
def test_a_bad_setting_is_named(arguments: list[str], variables: dict[str, str], name: str) -> None:
    finished = run("serve", *arguments, variables=variables)
    assert finished.returncode == 2
    assert_one_line(finished, name)


@pytest.mark.slow
def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('model = "demo"\nno_such_key = 1\n')
    finished = run("serve", "--config", str(file))
    assert finished.returncode == 2
    assert_one_line(finished, "no_such_key", str(file))


@pytest.mark.slow
def test_a_chat_template_that_is_not_there() -> None:
    finished = run("serve", "--port", "0", "--chat-template", "/nonexistent.jinja")
    assert finished.returncode == 78
    assert_one_line(finished, "/nonexistent.jinja")


@pytest.mark.slow
def test_row54_a_model_that_is_not_there() -> None:
    finished = run("serve", "--port", "0", "--model", "/nonexistent")
    assert finished.returncode == 78
    assert finished.stderr.count("\n") == 1
    assert_one_line(finished, "/nonexistent")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_row56_a_missing_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    finished = run("serve", "--port", "0", "--model", str(checkpoint))
    assert finished.returncode == 78
    assert_one_line(finished, name)


@pytest.mark.slow
def test_row54_truncated_weights_are_named(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    finished = run("serve", "--port", "0", "--threads", "1", "--model", str(checkpoint))
    assert finished.returncode == 78
    assert_one_line(finished, "model.safetensors")


@pytest.mark.slow
def test_row49_a_plan_over_the_cap_is_refused_with_numbers() -> None:
    finished = run("serve", "--port", "0", "--memory-cap-bytes", "1000000000")
    assert finished.returncode == 78
    assert "Traceback" not in finished.stderr
    assert "weights" in finished.stderr
    assert "cap" in finished.stderr


@pytest.mark.slow
def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = run("serve", "--port", str(port))
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("mixtral-serve: ")
    assert str(port) in finished.stderr.splitlines()[-1]
