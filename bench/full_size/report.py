"""What was found, for people: tables of text.

Owns: ``table`` and the sections it is made of. Milliseconds and gigabytes, one line per fact.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.full_size.capacity import LIMIT_S, Capacity
from bench.full_size.cost_model import BANDWIDTH_BOUND, FITTED
from bench.full_size.extrapolation import DECODES, PREFILL, RULE, Expected
from bench.full_size.grid import Measured
from bench.full_size.measurement import Findings
from bench.measure import Quantiles
from bench.workload import SHAPES


def table(found: Findings) -> str:
    """All sections that there is something to say in."""
    sections = (_heading, _memory, _grid, _costs, _bursts, _rates, _confirmation, _extrapolation, _cut)
    return "\n\n".join(text for section in sections if (text := "\n".join(section(found))))


def _heading(found: Findings) -> Iterator[str]:
    engine = found.engine
    plan = engine.plan
    layers, of = plan.shape.num_layers, plan.full_shape.num_layers
    yield f"{plan.settings.model}, {layers} of {of} layers, {plan.kind} weights, {engine.backend} kernels"
    yield f"{engine.num_threads} threads; a plain read gets {engine.read_bytes_per_s / 1e9:.1f} GB/s"


def _memory(found: Findings) -> Iterator[str]:
    plan, peak = found.engine.plan.serving, found.memory
    yield "memory"
    yield plan.memory.table()
    if peak is None or peak.peak_anon_bytes is None or peak.loaded_anon_bytes is None:
        yield "  the kernel does not say how much this process takes"
        return
    yield f"  {'this process, loaded':<36}{peak.loaded_anon_bytes / 1e9:>9.3f} GB anonymous"
    share = peak.peak_anon_bytes / plan.engine_bytes
    verdict = "within" if share <= 1 else "BEYOND"
    yield f"  {'this process, the most after a step':<36}{peak.peak_anon_bytes / 1e9:>9.3f} GB anonymous"
    yield f"  {'planned for this process':<36}{plan.engine_bytes / 1e9:>9.3f} GB: {verdict}, {share:.1%}"
    if peak.high_water_bytes is not None:
        yield f"  {'high-water mark, files included':<36}{peak.high_water_bytes / 1e9:>9.3f} GB"


def _grid(found: Findings) -> Iterator[str]:
    if not found.grid.measured:
        return
    layers = found.engine.plan.shape.num_layers
    heads = ("ms", "ms/layer", "rows/s", "experts", "weights GB/s", "runs", "model")
    yield f"{'one step':<44}" + "".join(f"{head:>13}" for head in heads)
    for one in found.grid.measured:
        yield f"{one.point!s:<44}" + "".join(f"{text:>13}" for text in _grid_row(found, one, layers))


def _grid_row(found: Findings, one: Measured, layers: int) -> Iterator[str]:
    yield f"{one.median_s * 1e3:.1f}"
    yield f"{one.median_s / layers * 1e3:.2f}"
    yield f"{one.point.num_rows / one.median_s:.1f}"
    yield f"{one.touched_experts:.2f}"
    yield f"{one.work.weight_bytes / one.median_s / 1e9:.1f}"
    yield str(one.num_runs)
    yield "-" if found.costs is None else f"{found.costs.model.seconds(one.work) / one.median_s - 1:+.1%}"


def _costs(found: Findings) -> Iterator[str]:
    if found.costs is None or found.fit_error is None:
        return
    error = found.fit_error
    worst = found.grid.measured[error.worst_index].point
    yield "cost model of a step"
    model = found.costs.model
    yield f"  {'a step':<14} {model.fixed.step_s * 1e3:.2f} ms in the runner"
    yield f"  {'':<14} {found.costs.outside_runner_s * 1e3:.2f} ms around it"
    yield f"  {'a layer':<14} {model.fixed.layer_s * 1e3:.3f} ms"
    for name in FITTED:
        yield f"  {name:<14} {_rate(name, model.seconds_per[name])}"
    yield f"  {'overlap':<14} {model.overlap:g} (1: weights are read, then computed with; larger: at once)"
    spread = f"median {error.median:.1%}, 90 % within {error.p90:.1%}, worst {error.worst:.1%}"
    yield f"  error on the grid: {spread} ({worst})"
    yield f"  most popular expert: {found.costs.popularity.most_popular:.0%} of the rows"


def _rate(name: str, seconds_per: float) -> str:
    if seconds_per == 0:
        return "no share that could be told apart"
    if name in BANDWIDTH_BOUND:
        return f"{1e-9 / seconds_per:.1f} GB/s"
    if name == "operations":
        return f"{1e-9 / seconds_per:.0f} G operations/s"
    unit = {"pairs": "query and key", "sampled": "sampled token"}[name]
    return f"{seconds_per * 1e6:.3g} us per {unit}"


def _bursts(found: Findings) -> Iterator[str]:
    if not found.bursts.bursts:
        return
    heads = ("TTFT p50", "p95", "predicted p50", "ITL p50", "p95", "predicted p50")
    yield f"{'requests at once, ms':<34}" + "".join(f"{head:>15}" for head in heads)
    for one in found.bursts.bursts:
        name = f"{one.num_requests} x {one.num_prompt_tokens} prompt tokens"
        measured, predicted = one.measured, one.predicted
        values = [measured.ttft_s.p50, measured.ttft_s.p95, predicted.ttft_s.p50]
        values += [measured.itl_s.p50, measured.itl_s.p95, predicted.itl_s.p50]
        yield f"{name:<34}" + "".join(f"{_ms(value):>15}" for value in values)


def _rates(found: Findings) -> Iterator[str]:
    if not found.capacities:
        return
    plan = found.engine.plan
    yield f"highest rate with p95 under {LIMIT_S * 1e3:.0f} ms, {plan.shape.num_layers} layers, simulated"
    for kind, one in found.capacities.items():
        yield f"  {kind:<12} {_capacity(one)}"


def _capacity(one: Capacity) -> str:
    if not one.rate_per_s:
        return f"0/s: {one.reason}; saturated {one.saturated_per_s:.3g}/s"
    times = f"p50 {_ms(one.p50_s)} ms, p95 {_ms(one.p95_s)} ms, alone {_ms(one.alone_s)} ms"
    return f"{one.rate_per_s:g}/s, {times}; saturated {one.saturated_per_s:.3g}/s"


def _confirmation(found: Findings) -> Iterator[str]:
    one = found.confirmation
    if one is None:
        return
    answered = f"{one.measured.num_complete} of {one.measured.num_requests} answered"
    yield f"load of {one.rate_per_s:g} {one.kind} requests/s for {one.duration_s:.0f} s: {answered}"
    yield f"{'ms':<14}{'p50':>12}{'p95':>12}{'predicted p50':>16}{'p95':>12}"
    rows: list[tuple[str, Quantiles, Quantiles]] = [
        ("first token", one.measured.ttft_s, one.predicted.ttft_s),
        ("inter-token", one.measured.itl_s, one.predicted.itl_s),
        ("end to end", one.measured.e2e_s, one.predicted.e2e_s),
    ]
    for name, measured, predicted in rows:
        yield (
            f"{name:<14}{_ms(measured.p50):>12}{_ms(measured.p95):>12}{_ms(predicted.p50):>16}{_ms(predicted.p95):>12}"
        )


def _extrapolation(found: Findings) -> Iterator[str]:
    if not found.expected:
        return
    full = found.engine.plan.full_shape
    yield f"all {full.num_layers} layers, extrapolated: {RULE}"
    heads = [f"decode x{batch}" for batch in DECODES] + [f"prefill {PREFILL}"]
    heads += [f"{kind} {what}" for kind in SHAPES for what in ("alone", "rate", "most")]
    yield f"{'ms; prompt tokens/s; requests/s':<34}" + "".join(f"{head:>15}" for head in heads)
    for one in found.expected:
        yield f"{one.target!s:<34}" + "".join(f"{text:>15}" for text in _expected_row(one))


def _expected_row(one: Expected) -> Iterator[str]:
    for batch in DECODES:
        yield f"{one.decode_s[batch] * 1e3:.0f}"
    yield f"{one.prefill_tokens_per_s:.0f}"
    for kind in SHAPES:
        capacity = one.capacities.get(kind)
        if capacity is None:
            yield from ("-", "-", "-")
        else:
            yield f"{capacity.alone_s * 1e3:.0f}"
            yield f"{capacity.rate_per_s:g}"
            yield f"{capacity.saturated_per_s:.2g}"


def _cut(found: Findings) -> Iterator[str]:
    if found.cut:
        yield "not measured"
        yield from (f"  {line}" for line in found.cut)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f}"
