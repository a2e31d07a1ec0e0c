"""The benchmark of loading: real rounds on the packed demo model, and what it says of checkpoints it cannot load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.loading import Round, main, measure, table
from mixtral_serve.demo import checkpoint_path
from mixtral_serve.model.checkpoint import open_checkpoint
from mixtral_serve.model.quantize import quantize_checkpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "demo-int8"
    quantize_checkpoint(open_checkpoint(checkpoint_path()), path, "int8", num_workers=1)
    return path


def test_a_rate_is_the_bytes_of_all_files_over_the_time_of_the_work_alone(packed: Path) -> None:
    now_s = 0.0
    pauses_s: list[float] = []

    def clock() -> float:
        """Every look takes a quarter of a second: so long is any work."""
        nonlocal now_s
        now_s += 0.25
        return now_s

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        pauses_s.append(seconds)

    found = measure(packed, rounds=2, pause_s=7.0, clock=clock, sleep=sleep)
    manifest = open_checkpoint(packed).manifest
    assert manifest is not None
    expected = sum((packed / name).stat().st_size for name in manifest.files) / 1e9 / 0.25
    assert pauses_s == [7.0] * 4, "before each writing and each loading"
    for one in found:
        assert (one.writing, one.loading) == pytest.approx((expected, expected))


def test_all_rounds_are_printed_and_written(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(packed), "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "found.json")]) == 0
    told = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert len(told["rounds"]) == 2
    assert all(one["writing"] > 0 and one["loading"] > 0 for one in told["rounds"])
    assert told["machine"]["num_cpus"] >= 1
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == table([Round(**one) for one in told["rounds"]])


def test_a_checkpoint_that_is_not_packed_is_refused_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint_path())]) == 1
    assert "mixtral-serve quantize" in capsys.readouterr().err


def test_a_checkpoint_that_broke_is_refused(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted(packed.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert main([str(packed), "--rounds", "1"]) == 1
    finally:
        file.write_bytes(whole)
    assert file.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [["--rounds", "0"], ["--threads", "0"], ["--pause", "-1"], ["--pause", "601"], ["--rounds", "x"]]
)
def test_options_out_of_bounds_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["nowhere", *option])
    assert raised.value.code == 2
    assert option[0] in capsys.readouterr().err
