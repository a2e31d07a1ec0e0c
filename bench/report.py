"""What a load test found: a summary, its table and its JSON.

Owns: ``LoadReport``. Latencies are of requests that came out right; throughput counts their tokens only; errors are
counted by kind, beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.completions import Outcome
from bench.measure import Machine, Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Seconds, counts and rates of one run. Its fields are the keys of the JSON."""

    ttft_s: Quantiles
    itl_s: Quantiles
    e2e_s: Quantiles
    requests: int
    """Requests that were due, errors included."""
    errors: int
    requests_per_s: float
    """Right answers per second, from the first arrival to the last end."""
    output_tokens_per_s: float
    errors_by_kind: Mapping[str, int]
    error_examples: Mapping[str, str]
    cached_tokens_per_request: float
    """Mean, as the server reported."""
    wall_s: float
    client_cpu_s: float
    """Processor time of the load generator itself, which is part of the measured machine."""
    send_lag_s: Quantiles
    """How late requests were sent; contained in every latency."""
    parameters: Mapping[str, object]
    seed: int
    date: str
    machine: Machine

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    def table(self) -> str:
        """For people."""
        rows = [
            ("", "p50", "p95", "p99"),
            ("time to first token", *_milliseconds(self.ttft_s)),
            ("inter-token latency", *_milliseconds(self.itl_s)),
            ("end to end", *_milliseconds(self.e2e_s)),
        ]
        lines = [f"{name:<22}{p50:>12}{p95:>12}{p99:>12}" for name, p50, p95, p99 in rows]
        lines += [
            "",
            f"{'requests':<22}{self.requests:>12}",
            f"{'errors':<22}{self.errors:>12}"
            + "".join(f"  {kind}: {count}" for kind, count in self.errors_by_kind.items()),
            f"{'requests/s':<22}{self.requests_per_s:>12.2f}",
            f"{'output tokens/s':<22}{self.output_tokens_per_s:>12.1f}",
            f"{'cached tokens/request':<22}{self.cached_tokens_per_request:>12.1f}",
            f"{'seconds':<22}{self.wall_s:>12.1f}",
            f"{'client CPU':<22}{self.client_cpu_s / self.wall_s if self.wall_s else 0.0:>12.1%}  of one core",
        ]
        lines += [f"example of {kind}: {text}" for kind, text in self.error_examples.items()]
        return "\n".join(lines)


def summarise(
    outcomes: Sequence[Outcome],
    *,
    wall_s: float,
    client_cpu_s: float,
    parameters: Mapping[str, object],
    seed: int,
    date: str,
) -> LoadReport:
    """The report of ``outcomes``, which took ``wall_s`` seconds together."""
    right = [outcome for outcome in outcomes if outcome.error is None]
    kinds = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    examples: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            examples.setdefault(outcome.error, outcome.detail[:300])
    return LoadReport(
        ttft_s=Quantiles.of(o.ttft_s for o in right if o.ttft_s is not None),
        itl_s=Quantiles.of(gap for o in right for gap in o.gaps_s),
        e2e_s=Quantiles.of(o.e2e_s for o in right),
        requests=len(outcomes),
        errors=kinds.total(),
        requests_per_s=len(right) / wall_s if wall_s else 0.0,
        output_tokens_per_s=sum(o.num_output_tokens for o in right) / wall_s if wall_s else 0.0,
        errors_by_kind=dict(kinds.most_common()),
        error_examples=examples,
        cached_tokens_per_request=sum(o.num_cached_tokens for o in right) / len(right) if right else 0.0,
        wall_s=wall_s,
        client_cpu_s=client_cpu_s,
        send_lag_s=Quantiles.of(o.send_lag_s for o in outcomes),
        parameters=parameters,
        seed=seed,
        date=date,
        machine=Machine.this(),
    )


def _milliseconds(quantiles: Quantiles) -> tuple[str, str, str]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.1f} ms"

    return text(quantiles.p50), text(quantiles.p95), text(quantiles.p99)
