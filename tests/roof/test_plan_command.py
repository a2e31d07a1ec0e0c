"""``mixtral-serve plan``: what it prints, and what its exit code says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_serve.cli import main
from mixtral_serve.compose.known_models import KNOWN_MODELS
from mixtral_serve.compose.limits import Limit
from mixtral_serve.compose.plan_command import make_plan
from mixtral_serve.model.config_file import read_shape
from mixtral_serve.settings import Settings

LARGE = Limit("memory of a large machine", 500_000_000_000)


@pytest.mark.parametrize(
    ("model", "weights", "cap_bytes", "exit_code"),
    [
        ("mixtral-8x7b", "fp32", 90_000_000_000, 78),
        ("mixtral-8x7b", "bf16", 90_000_000_000, 78),
        ("mixtral-8x7b", "bf16", 128_000_000_000, 0),
        ("mixtral-8x7b", "int8", 90_000_000_000, 0),
        ("mixtral-8x7b", "int8", 48_000_000_000, 78),
        ("mixtral-8x7b", "int4", 90_000_000_000, 0),
        ("mixtral-8x7b", "int4", 32_000_000_000, 0),
        ("mixtral-8x7b", "int4", 27_000_000_000, 78),
        ("mixtral-8x22b", "int4", 90_000_000_000, 0),
        ("mixtral-8x22b", "int8", 90_000_000_000, 78),
        ("demo", "fp32", 2_000_000_000, 0),
        ("demo", "fp32", 200_000_000, 78),
    ],
)
def test_row49_the_exit_code_says_whether_it_fits_under_the_cap(
    model: str, weights: str, cap_bytes: int, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--model", model, "--weights", weights, "--memory-cap-bytes", str(cap_bytes)]
    assert main(argv) == exit_code
    table = capsys.readouterr().out
    assert f"{cap_bytes / 1e9:.3f} GB" in table
    assert ("MISSING" in table) is (exit_code == 78)
    assert main([*argv, "--json"]) == exit_code
    assert json.loads(capsys.readouterr().out)["fits"] is (exit_code == 0)


def test_it_says_how_many_tokens_and_requests_the_rest_buys() -> None:
    report = make_plan(Settings(model="mixtral-8x7b", weights="int4"), machine_limit=LARGE)
    assert "131,072 bytes" in report.text
    assert "of 1,024 tokens" in report.text
    assert "ok: memory of a large machine: 500.000 GB" in report.text
    values = report.values
    num_tokens, counts = values["num_kv_tokens"], values["num_requests_at_once"]
    assert isinstance(num_tokens, int)
    assert isinstance(counts, dict)
    assert num_tokens > 400_000
    for length, count in counts.items():
        assert count * int(length) <= num_tokens < (count + 1) * int(length) + 16
    parts = values["parts"]
    assert isinstance(parts, dict)
    assert sum(parts.values()) == values["planned_bytes"]


def test_keys_and_values_in_int8_buy_nearly_twice_the_tokens() -> None:
    bf16, int8 = (
        make_plan(Settings(model="mixtral-8x7b", weights="int4", kv_cache_dtype=dtype), machine_limit=LARGE).values
        for dtype in ("bf16", "int8")
    )
    assert int8["kv_bytes_per_token"] == 2 * 32 * 8 * (128 + 4)
    assert 1.9 < int8["num_kv_tokens"] / bf16["num_kv_tokens"] < 1.97  # type: ignore[operator]


def test_a_small_machine_is_a_warning_and_not_a_failure() -> None:
    small = Limit("memory of a laptop", 8_000_000_000)
    report = make_plan(Settings(model="mixtral-8x7b", weights="int4"), machine_limit=small)
    assert "WARNING: memory of a laptop: 8.000 GB, less than planned" in report.text
    assert report.values["machine"] == {"name": "memory of a laptop", "limit_bytes": 8_000_000_000, "fits": False}
    assert report.exit_code == 0


def test_lengths_beyond_the_model_are_not_promised() -> None:
    report = make_plan(Settings(model="demo"), machine_limit=LARGE)
    assert list(report.values["num_requests_at_once"]) == ["1024", "4096"]  # type: ignore[call-overload]


def test_a_directory_counts_for_more_than_a_name(
    tmp_path: Path, mixtral_8x7b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_plan(Settings(model=str(mixtral_8x7b), weights="int4"), machine_limit=LARGE).exit_code == 0
    (tmp_path / "mixtral-8x7b").mkdir()
    monkeypatch.chdir(tmp_path)
    report = make_plan(Settings(model="mixtral-8x7b", weights="int4"), machine_limit=LARGE)
    assert (report.exit_code, "config.json" in report.text) == (78, True)


def test_what_is_neither_directory_nor_name_is_refused_with_the_names() -> None:
    report = make_plan(Settings(model="no/such/model"), machine_limit=LARGE)
    assert report.exit_code == 78
    assert "no/such/model" in report.text
    assert "mixtral-8x22b" in report.text


def test_the_known_shapes_are_those_of_the_published_configurations(mixtral_8x7b: Path) -> None:
    published, known = read_shape(mixtral_8x7b), KNOWN_MODELS["mixtral-8x7b"]
    assert published == known
    assert known.num_parameters == 46_702_792_704
    assert KNOWN_MODELS["mixtral-8x22b"].num_parameters == 140_630_071_296
