"""The serving plan: what the settings mean for memory and schedule."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mixtral_serve.compose.doctor import examine
from mixtral_serve.compose.plan import plan_serving, scheduler_config
from mixtral_serve.compose.server import greeting
from mixtral_serve.contract import ModelInfo
from mixtral_serve.settings import Settings
from scheduler.errors import PlanError


def test_the_demo_model_is_planned_within_the_default_cap() -> None:
    plan = plan_serving(Settings())
    assert plan.memory.planned_bytes <= 90_000_000_000
    assert plan.model_names == ("mixtral-demo",)
    assert plan.max_model_len == plan.shape.max_model_len >= 4096


def test_mixtral_8x7b_in_bf16_does_not_fit_and_the_table_says_by_how_much(mixtral_8x7b: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_serving(Settings(model=str(mixtral_8x7b), weights="bf16"))
    table = str(caught.value)
    assert "93.4" in table
    assert "MISSING" in table
    assert "90.000 GB" in table


def test_mixtral_8x7b_in_bf16_fits_under_a_larger_cap_with_the_kv_that_the_rest_buys(mixtral_8x7b: Path) -> None:
    settings = Settings(model=str(mixtral_8x7b), weights="bf16", memory_cap_bytes=128_000_000_000)
    plan = plan_serving(settings)
    assert plan.model_names == ("Mixtral-8x7B",)
    assert plan.shape.num_parameters == 46_702_792_704
    assert plan.memory.layout.bytes_per_token == 131_072
    left = 128_000_000_000 - plan.memory.planned_bytes
    assert 0 <= left < plan.memory.layout.bytes_per_block


def test_the_kv_limit_bounds_the_blocks_and_the_schedule_follows() -> None:
    settings = Settings(kv_cache_memory_bytes=40_000_000, long_prefill_token_threshold=100, max_model_len=512)
    plan = plan_serving(settings)
    usable_bytes = plan.memory.kv_cache_bytes - plan.memory.layout.bytes_per_block
    assert usable_bytes <= 40_000_000 + plan.memory.layout.bytes_per_block
    config = scheduler_config(settings, plan)
    assert (config.num_blocks, config.max_model_len, config.max_prefill_chunk) == (plan.memory.num_blocks, 512, 100)


def test_the_cache_seed_is_new_each_time() -> None:
    plan = plan_serving(Settings())
    assert scheduler_config(Settings(), plan).cache_seed != scheduler_config(Settings(), plan).cache_seed


def meminfo_of(path: Path, *, total_bytes: int, available_bytes: int) -> Path:
    path.write_text(f"MemTotal:  {total_bytes // 1024} kB\nMemAvailable:  {available_bytes // 1024} kB\n")
    return path


def test_the_doctor_warns_when_the_machine_has_less_memory_left_than_planned(tmp_path: Path) -> None:
    meminfo = meminfo_of(tmp_path / "meminfo", total_bytes=64_000_000_000, available_bytes=1_000_000)
    report = examine(Settings(port=0, threads=1), meminfo=meminfo)
    assert {finding.subject for finding in report.findings if finding.verdict == "warning"} == {"machine memory"}
    assert report.exit_code == 0


def test_row49_the_doctor_fails_where_the_machine_is_too_small(tmp_path: Path) -> None:
    meminfo = meminfo_of(tmp_path / "meminfo", total_bytes=1_000_000_000, available_bytes=900_000_000)
    report = examine(Settings(port=0, threads=1), meminfo=meminfo)
    (failure,) = [finding for finding in report.findings if finding.verdict == "failure"]
    assert failure.subject == "memory plan"
    assert "memory of this machine, less a reserve" in failure.detail
    assert report.exit_code == 78


def test_the_greeting_shows_a_curl_command_whose_body_is_json() -> None:
    plan = plan_serving(Settings())
    info = ModelInfo(
        name="mixtral-demo",
        fingerprint="f",
        vocab_size=1,
        max_model_len=1,
        eos_token_ids=(2,),
        num_blocks=2,
        block_size=1,
        weights_bytes=1,
        kv_cache_bytes=1,
    )
    text = greeting("http://127.0.0.1:11400", plan, info)
    body = msgspec.json.decode(text.split("'")[3])
    assert body["model"] == "mixtral-demo"
    assert "http://127.0.0.1:11400/v1/chat/completions" in text
