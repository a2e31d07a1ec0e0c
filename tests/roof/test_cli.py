"""The command line: what people type and the exit codes they get."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from mixtral_serve import __version__
from mixtral_serve.cli import main
from mixtral_serve.demo import checkpoint_path


def test_version_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mixtral-serve {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["serve", "--no-such-flag"], ["serve", "--weights", "int3"]])
def test_a_wrong_command_line_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: mixtral-serve" in capsys.readouterr().err


def test_print_config_shows_each_value_and_its_source_and_serves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIXTRAL_SERVE_MAX_N", "7")
    file = tmp_path / "s.toml"
    file.write_text("block_size = 32")
    assert main(["serve", "--port", "1", "--config", str(file), "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["port", "=", "1", "#", "flag"] for line in lines)
    assert any(line.split() == ["max_n", "=", "7", "#", "environment"] for line in lines)
    assert any(line.split()[:3] == ["block_size", "=", "32"] and line.endswith(f"file {file}") for line in lines)


def test_a_bad_setting_is_one_line_on_standard_error_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "no/such/directory"], "no/such/directory"),
        (["--memory-cap-bytes", "1000000"], "does not fit under the cap"),
        (["--max-num-seqs", "600"], "max_num_batched_tokens"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["--host", "0.0.0.0"], "insecure_no_auth"),
        (["--host", "somewhere.example"], "insecure_no_auth"),
    ],
)
def test_what_cannot_be_served_exits_with_78_and_says_why(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *argv]) == 78
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_checkpoint_without_its_weights_is_found_by_doctor_and_serve_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_path(), broken)
    (broken / "model.safetensors").unlink()
    assert main(["doctor", "--port", "0", "--model", str(broken)]) == 78
    assert "model.safetensors" in capsys.readouterr().out
    assert main(["serve", "--port", "0", "--model", str(broken)]) == 78
    said = capsys.readouterr().err
    assert "model.safetensors" in said
    assert said.count("\n") == 1


def test_an_address_that_is_taken_exits_with_1_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_the_doctor_finds_the_demo_model_servable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "0"]) == 0
    report = capsys.readouterr().out
    assert "mixtral-demo" in report
    assert "FAIL" not in report


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "no/such/directory"], "no/such/directory"),
        (["--memory-cap-bytes", "1000000"], "MISSING"),
        (["--max-num-seqs", "600"], "max_num_batched_tokens"),
        (["--max-model-len", "100000"], "max_model_len"),
        (["--host", "192.0.2.1"], "insecure_no_auth"),
        (["--host", "192.0.2.1", "--insecure-no-auth"], "192.0.2.1"),
    ],
)
def test_the_doctor_names_what_would_fail_and_exits_with_78(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--port", "0", *argv]) == 78
    lines = capsys.readouterr().out.splitlines()
    assert any("FAIL" in line for line in lines)
    assert any(said in line for line in lines)
