"""What comes out: the table for people and the figures for programs.

Owns: ``table`` and ``figures``. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from bench.peers.contenders import RATED, Entry
from bench.peers.results import Plan, Results, Row

_NAME_WIDTH = 22
_CELL_WIDTH = 13


def table(plan: Plan, entries: Sequence[Entry], results: Results) -> str:
    """Tokens per second of every contender, then the ratios of ours to the others."""
    lines = [_header("tokens per second", plan.rows)]
    for entry in entries:
        reason = results.reason(entry.name)
        if reason is not None:
            lines.append(f"{entry.name:<{_NAME_WIDTH}}  {reason}")
            continue
        cells = [results.tokens_per_s(entry.name, row) for row in plan.rows]
        lines.append(_line(entry.name, ["failed" if cell is None else f"{cell:.1f}" for cell in cells]))
    for rated in RATED:
        if results.reason(rated) is None:
            lines += _ratios(rated, plan, entries, results)
    lines += [
        "",
        f"medians of {plan.num_rounds} rounds; a ratio is the median of the rounds' own ratios",
        f"plain read of memory: {_gigabytes(results.bandwidth)} GB/s",
    ]
    lines += [
        f"{name}, {row}: {reason}"
        for (name, row), reason in results.row_failures.items()
        if results.reason(name) is None
    ]
    lines += [f"{name}, later: {why}" for name, why in results.failures.items() if results.reason(name) is None]
    return "\n".join(lines)


def _ratios(rated: str, plan: Plan, entries: Sequence[Entry], results: Results) -> list[str]:
    lines = ["", _header(f"{rated} to", plan.rows)]
    for entry in entries:
        if entry.name != rated and results.reason(entry.name) is None:
            ratios = [results.ratio(rated, entry.name, row) for row in plan.rows]
            lines.append(_line(entry.name, ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]))
    return lines


def _header(title: str, rows: Sequence[Row]) -> str:
    return _line(title, [str(row) for row in rows])


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{cell:>{_CELL_WIDTH}}" for cell in cells)


def _gigabytes(bandwidth: Sequence[float]) -> str:
    return f"{median(bandwidth) / 1e9:.1f}" if bandwidth else "-"


def figures(plan: Plan, entries: Sequence[Entry], results: Results) -> dict[str, object]:
    """The JSON, without what the command knows of its machine and options."""
    return {
        "contenders": [_contender(entry, results) for entry in entries],
        "rows": [_row(row, entries, results) for row in plan.rows],
        "read_bandwidth_bytes_per_s": {
            "median": median(results.bandwidth) if results.bandwidth else None,
            "rounds": results.bandwidth,
        },
    }


def _contender(entry: Entry, results: Results) -> dict[str, object]:
    facts = results.facts.get(entry.name, {})
    return {
        "name": entry.name,
        "variant": entry.variant,
        "is_ours": entry.is_ours,
        "version": facts.get("version"),
        "details": facts.get("details", {}),
        "resident_bytes": results.resident_bytes.get(entry.name),
        "missing_because": results.reason(entry.name),
    }


def _row(row: Row, entries: Sequence[Entry], results: Results) -> dict[str, object]:
    measured = {}
    for entry in entries:
        samples = results.samples.get((entry.name, row), [])
        if samples:
            measured[entry.name] = {
                "tokens_per_s": results.tokens_per_s(entry.name, row),
                "rounds": [
                    {"round": s.round, "seconds": s.seconds, "tokens": s.tokens, "tokens_per_s": s.tokens_per_s}
                    for s in samples
                ],
            }
    others = {
        rated: {entry.name: results.ratio(rated, entry.name, row) for entry in entries if entry.name != rated}
        for rated in RATED
    }
    return {
        "row": str(row),
        "kind": row.kind,
        "size": row.size,
        "measured": measured,
        "failed": {name: why for (name, failed), why in results.row_failures.items() if failed == row},
        "ratios": {
            rated: {name: ratio for name, ratio in ratios.items() if ratio is not None}
            for rated, ratios in others.items()
        },
    }
