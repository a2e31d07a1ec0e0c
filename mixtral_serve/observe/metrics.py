"""Prometheus metrics of the engine, under vLLM's names and with vLLM's buckets, so that its dashboards work.

Owns: ``EngineMetrics``, a listener of the engine's client, with a registry of its own.

Invariants: a label's value comes from a closed set that exists from the start, never from a request, so the number
of series is constant. The engine's counters start at zero again when it is restarted; ours only grow. Nothing
reads a clock: times are those that the client hands in.

Rejected: the library's global registry (two servers in one process would share it) and metrics per HTTP route
(paths are chosen by clients).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from mixtral_serve.engine.listener import EngineState
from mixtral_serve.engine.messages import Delta, EngineStats, Submit, Tick
from scheduler.lifecycle import FinishReason

TTFT_BUCKETS_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BUCKETS_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_LABELS: Final = ("model_name", "engine")
_FINISHED_REASONS: Final = {
    FinishReason.STOP.value: "stop",
    FinishReason.LENGTH.value: "length",
    FinishReason.CANCELLED.value: "abort",
    FinishReason.DEADLINE.value: "abort",
    FinishReason.ERROR.value: "error",
}
_COUNTERS: Final = {
    "num_preemptions": ("num_preemptions", "Times that a running request gave its blocks back."),
    "num_prefix_queried_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "num_prefix_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "num_generation_tokens": ("generation_tokens", "Sampled tokens."),
}
"""Field of ``EngineStats`` -> name and description."""


@dataclass(slots=True)
class _Live:
    """What the histograms need to remember of a live request."""

    arrival_s: float
    last_token_s: float | None = None


class _Growth:
    """A counter of ours that follows one of the engine's across restarts."""

    __slots__ = ("_counter", "_last")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last = 0

    def follow(self, value: int) -> None:
        """``value`` is what the engine counts now; below the last one, it has started again from zero."""
        grown = value - self._last if value >= self._last else value
        self._last = value
        if grown:
            self._counter.inc(grown)


class EngineMetrics:
    """Listens to the engine's client and keeps the numbers of ``/metrics``."""

    def __init__(self, model_name: str) -> None:
        self.registry: Final = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._model_name = model_name
        self._live: dict[str, _Live] = {}
        self._running = self._gauge("num_requests_running", "Requests that run.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait, preempted ones included.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS_S)
        self._itl = self._histogram("inter_token_latency_seconds", "From token to token.", ITL_BUCKETS_S)
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Arrival to end, of requests that ended by themselves.", E2E_BUCKETS_S
        )
        self._growths = tuple(
            (field, _Growth(Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(model_name, "0")))
            for field, (name, text) in _COUNTERS.items()
        )
        ended = Counter(
            "vllm:request_success", "Ended requests.", (*_LABELS, "finished_reason"), registry=self.registry
        )
        self._ended = {reason: ended.labels(model_name, "0", label) for reason, label in _FINISHED_REASONS.items()}

    def render(self) -> bytes:
        """The page of ``/metrics`` in Prometheus' text format."""
        return generate_latest(self.registry)

    # EngineListener

    def on_submit(self, submit: Submit, now: float) -> None:
        """See ``EngineListener``."""
        del now  # a request arrived when its head was read, before it was tokenised
        self._live[submit.request_id] = _Live(submit.arrival_s)

    def on_tick(self, tick: Tick, now: float) -> None:
        """See ``EngineListener``."""
        self._take_stats(tick.stats)
        for delta in tick.deltas:
            live = self._live.get(delta.request_id)
            if live is not None:
                self._take_delta(delta, live, now)

    def on_state(self, state: EngineState) -> None:
        """See ``EngineListener``."""
        if state is not EngineState.READY:
            self._take_stats(EngineStats())

    def _take_stats(self, stats: EngineStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0)
        for field, growth in self._growths:
            growth.follow(getattr(stats, field))

    def _take_delta(self, delta: Delta, live: _Live, now: float) -> None:
        num_tokens = len(delta.token_ids)
        if num_tokens:
            if live.last_token_s is None:
                self._ttft.observe(now - live.arrival_s)
                num_tokens -= 1
                live.last_token_s = now
            for _ in range(num_tokens):
                self._itl.observe((now - live.last_token_s) / num_tokens)
            live.last_token_s = now
        if delta.finish_reason is not None:
            del self._live[delta.request_id]
            self._ended[delta.finish_reason].inc()
            if delta.finish_reason in (FinishReason.STOP.value, FinishReason.LENGTH.value):
                self._e2e.observe(now - live.arrival_s)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(self._model_name, "0")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name, "0")
