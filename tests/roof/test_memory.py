"""The demands of the memory plan: that they add up, and that no real step takes more than its bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.compose.known_models import KNOWN_MODELS
from mixtral_serve.compose.limits import Limit
from mixtral_serve.compose.memory import MAX_ALTERNATIVES, demands_of, kv_layout, step_bytes
from mixtral_serve.compose.plan import plan_shape
from mixtral_serve.compose.server import planned_memory
from mixtral_serve.kernels.registry import KernelsUnavailableError, choose
from mixtral_serve.model.shape import ModelShape
from mixtral_serve.model.synthetic import write_synthetic_checkpoint
from mixtral_serve.settings import Settings
from mixtral_serve.text.grammar_vocabulary import MATCHER_BYTES
from scheduler.accountant import logprob_bytes, request_bytes
from scheduler.errors import PlanError

MIXTRAL = KNOWN_MODELS["mixtral-8x7b"]
GB = 1_000_000_000
MEDIUM = ModelShape(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=1536,
    num_layers=2,
    num_query_heads=6,
    num_kv_heads=2,
    head_dim=128,
    num_experts=8,
    num_experts_per_token=2,
    max_model_len=4096,
)
"""As wide, compared with its vocabulary, that every phase of a step shows."""


def test_the_rows_of_the_plan_are_the_demands_and_the_kv_cache() -> None:
    plan = plan_shape(Settings(weights="int4"), MIXTRAL, Path("Mixtral"))
    assert sum(plan.memory.demands.values()) == sum(asdict(plan.demands).values())
    assert sum(planned_memory(plan).parts.values()) == plan.memory.planned_bytes <= 90 * GB


def test_the_shares_of_the_processes_and_the_kernel_are_the_whole_plan() -> None:
    plan = plan_shape(Settings(weights="int8"), MIXTRAL, Path("Mixtral"))
    assert plan.engine_bytes + plan.demands.api_process == plan.processes_bytes
    assert plan.processes_bytes + plan.demands.page_tables == plan.memory.planned_bytes
    assert plan.demands.page_tables >= plan.processes_bytes // 512 * 0.99


def test_i36_the_largest_request_can_always_be_charged_however_small_the_cap() -> None:
    settings = Settings(max_num_seqs=1, max_num_queued_reqs=1, weights="int4")
    demands = demands_of(settings, MIXTRAL, max_model_len=32_768, cap_bytes=30 * GB)
    largest = request_bytes(16_384, 16_384, 16) + logprob_bytes(16_384, 16_384, MAX_ALTERNATIVES)
    assert demands.live_requests >= largest


def test_every_seat_of_the_default_settings_can_hold_a_constrained_request() -> None:
    settings = Settings(weights="int8")
    plan = plan_shape(settings, MIXTRAL, Path("Mixtral"))
    one = request_bytes(4096, 4096, settings.block_size) + MATCHER_BYTES
    assert settings.max_num_seqs * one <= plan.requests_budget_bytes


@given(st.integers(27 * GB, 200 * GB), st.integers(0, 20 * GB), st.sampled_from(["int4", "int8"]))
def test_i36_a_larger_cap_never_buys_fewer_blocks(cap_bytes: int, more_bytes: int, weights: str) -> None:
    settings = Settings(weights=weights)  # type: ignore[arg-type]  # one of the two that fit
    try:
        plan = plan_shape(settings, MIXTRAL, Path("Mixtral"), Limit("cap", cap_bytes))
    except PlanError:
        return
    larger = plan_shape(settings, MIXTRAL, Path("Mixtral"), Limit("cap", cap_bytes + more_bytes))
    assert plan.memory.planned_bytes <= cap_bytes
    assert larger.memory.num_blocks >= plan.memory.num_blocks


def test_keys_and_values_take_what_their_dtype_takes() -> None:
    bytes_per_token = {
        (weights, dtype): kv_layout(MIXTRAL, Settings(weights=weights, kv_cache_dtype=dtype)).bytes_per_token
        for weights, dtype in (("fp32", "auto"), ("int4", "auto"), ("int4", "int8"), ("int4", "fp32"))
    }
    assert list(bytes_per_token.values()) == [262_144, 131_072, 67_584, 262_144]


def test_a_step_takes_more_with_more_rows_more_sampled_rows_and_longer_contexts() -> None:
    def bytes_of(num_rows: int = 64, num_sampled: int = 64, num_context_tokens: int = 0) -> int:
        return step_bytes(
            MIXTRAL, "int4", num_rows=num_rows, num_sampled=num_sampled, num_context_tokens=num_context_tokens
        )

    assert bytes_of(num_rows=65) > bytes_of()
    assert bytes_of(num_sampled=65) > bytes_of()
    assert bytes_of(num_context_tokens=1) > bytes_of()


@pytest.fixture(scope="module")
def medium_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("medium") / "checkpoint"
    write_synthetic_checkpoint(path, MEDIUM, seed=1, weights="bf16")
    yield path
    for file in path.glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("weights", "kernels"),
    [("fp32", "auto"), ("bf16", "auto"), ("int8", "torch"), ("int8", "native"), ("int4", "native")],
)
def test_i35_no_step_takes_more_memory_than_its_bound(medium_checkpoint: Path, weights: str, kernels: str) -> None:
    if weights in ("int8", "int4"):
        try:
            choose(weights, kernels, dims=(MEDIUM.intermediate_size, MEDIUM.hidden_size))  # type: ignore[arg-type]
        except KernelsUnavailableError as error:
            pytest.skip(str(error))
    script = Path(__file__).with_name("step_peaks.py")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(
        [sys.executable, str(script), str(medium_checkpoint), weights, kernels],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert {step["kind"] for step in steps} >= {"large prefill", "many decodes", "filtered draws", "scored prompt"}
    assert not [step for step in steps if step["peak"] > step["bound"]]
    (large,) = [step for step in steps if step["rows"] == 2048]
    assert large["bound"] < 8 * large["peak"], "a bound that is never approached plans memory away"
