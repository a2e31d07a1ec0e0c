from __future__ import annotations

import secrets
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta, EngineStats, Submit, Tick
from mixtral_serve.observe.metrics import EngineMetrics

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def metrics() -> EngineMetrics:
    return EngineMetrics("m")


def tick(*deltas: Delta, **stats: int) -> Tick:
    return Tick(deltas=deltas, stats=EngineStats(**stats), timing=None)


def tokens(request_id: str, count: int = 1, reason: str | None = None) -> Delta:
    return Delta(request_id=request_id, token_ids=(7,) * count, finish_reason=reason)


def value(metrics: EngineMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"vllm:{name}", LABELS | labels)


def test_gauges_show_the_last_tick(metrics: EngineMetrics) -> None:
    metrics.on_tick(tick(num_running=3, num_waiting=2, num_blocks=8, num_used_blocks=2), 0.0)
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.25


def test_latencies_are_measured_on_the_clock_that_is_handed_in(metrics: EngineMetrics) -> None:
    metrics.on_submit(Submit(request_id="a", prompt=b"", arrival_s=10.0), 10.1)
    metrics.on_tick(tick(), 11.0)
    metrics.on_tick(tick(tokens("a")), 12.0)
    metrics.on_tick(tick(tokens("a")), 12.5)
    metrics.on_tick(tick(tokens("a", 2)), 13.5)
    metrics.on_tick(tick(tokens("a", 0, "stop")), 14.0)
    assert value(metrics, "time_to_first_token_seconds_sum") == 2.0
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_sum") == 1.5
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "e2e_request_latency_seconds_sum") == 4.0
    assert value(metrics, "request_success_total", finished_reason="stop") == 1


def test_ends_are_counted_by_their_reason_and_only_good_ones_have_a_latency(metrics: EngineMetrics) -> None:
    for reason in ("stop", "length", "cancelled", "deadline", "error"):
        metrics.on_submit(Submit(request_id=reason, prompt=b"", arrival_s=0.0), 0.0)
        metrics.on_tick(tick(tokens(reason, 1, reason)), 1.0)
    counts = {
        reason: value(metrics, "request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error")
    }
    assert counts == {"stop": 1, "length": 1, "abort": 2, "error": 1}
    assert value(metrics, "e2e_request_latency_seconds_count") == 2


def test_counters_go_on_when_the_engine_starts_again(metrics: EngineMetrics) -> None:
    names = {
        "num_preemptions": "num_preemptions_total",
        "num_prefix_queried_tokens": "prefix_cache_queries_total",
        "num_prefix_hit_tokens": "prefix_cache_hits_total",
        "num_prompt_tokens": "prompt_tokens_total",
        "num_generation_tokens": "generation_tokens_total",
    }
    for field, name in names.items():
        metrics.on_tick(tick(**{field: 5}), 0.0)
        metrics.on_tick(tick(**{field: 7}), 0.0)
        metrics.on_state(EngineState.RESTARTING)
        assert value(metrics, name) == 7
        metrics.on_state(EngineState.READY)
        metrics.on_tick(tick(**{field: 6}), 0.0)
        metrics.on_tick(tick(**{field: 6}), 0.0)
        assert value(metrics, name) == 13, name
        metrics.on_tick(tick(), 0.0)


def test_a_counter_that_fell_has_started_again(metrics: EngineMetrics) -> None:
    """Also where nobody said that the engine was gone."""
    for count in (5, 7, 2, 3):
        metrics.on_tick(tick(num_generation_tokens=count), 0.0)
    assert value(metrics, "generation_tokens_total") == 10


def test_a_dead_engine_runs_nothing(metrics: EngineMetrics) -> None:
    metrics.on_tick(tick(num_running=3, num_blocks=8, num_used_blocks=2), 0.0)
    metrics.on_state(EngineState.RESTARTING)
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "kv_cache_usage_perc") == 0


def test_deltas_of_requests_it_never_saw_are_ignored(metrics: EngineMetrics) -> None:
    metrics.on_tick(tick(tokens("ghost", 1, "stop")), 0.0)
    assert value(metrics, "request_success_total", finished_reason="stop") == 0


def series(metrics: EngineMetrics) -> set[tuple[str, Any]]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples}


def test_row25_the_series_are_the_same_whatever_clients_send(metrics: EngineMetrics) -> None:
    before = series(metrics)
    for number in range(10_000):
        request_id = secrets.token_hex(8)
        submit = Submit(request_id=request_id, prompt=b"", arrival_s=0.0, tenant=request_id, cache_salt=request_id)
        metrics.on_submit(submit, 0.0)
        metrics.on_tick(tick(tokens(request_id, 1, ("stop", "error", "cancelled")[number % 3])), 0.1)
    assert series(metrics) == before


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    first, second = EngineMetrics("m"), EngineMetrics("m")
    first.on_tick(tick(num_prompt_tokens=5), 0.0)
    assert value(second, "prompt_tokens_total") == 0


def test_a_tick_of_64_requests_costs_well_under_a_millisecond(metrics: EngineMetrics) -> None:
    for number in range(64):
        metrics.on_submit(Submit(request_id=str(number), prompt=b"", arrival_s=0.0), 0.0)
    busy = tick(*(tokens(str(number)) for number in range(64)), num_running=64, num_blocks=9)
    durations = []
    for number in range(50):
        start = time.perf_counter()
        metrics.on_tick(busy, number * 0.05)
        durations.append(time.perf_counter() - start)
    assert sorted(durations)[25] < 0.001  # some 0.07 ms
