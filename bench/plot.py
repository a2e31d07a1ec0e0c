"""The picture of a load test: how latencies are distributed, and how they went over time.

Owns: ``draw``. Matplotlib's object interface only, which has no global state and needs no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.completions import Outcome

_TTFT, _ITL, _E2E, _ERROR = "#1f77b4", "#2ca02c", "#d95f02", "#c00000"


def draw(path: Path, outcomes: Sequence[Outcome], *, title: str) -> None:
    """Write a PNG: cumulative distributions on the left, a timeline of the requests on the right.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)
    _distributions(left, [o for o in outcomes if o.error is None])
    _timeline(right, outcomes)
    figure.savefig(path, dpi=110, format="png")


def _distributions(axes: Axes, right: Sequence[Outcome]) -> None:
    samples = [
        ("time to first token", _TTFT, [o.ttft_s for o in right if o.ttft_s is not None]),
        ("inter-token latency", _ITL, [gap for o in right for gap in o.gaps_s]),
        ("end to end", _E2E, [o.e2e_s for o in right]),
    ]
    for label, colour, sample in samples:
        if sample:
            axes.ecdf([max(value, 1e-4) * 1e3 for value in sample], label=label, color=colour, linewidth=1.8)
    for share in (0.5, 0.95, 0.99):
        axes.axhline(share, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="milliseconds", ylabel="share of the sample at most")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95, 0.99], ["0", "25 %", "50 %", "75 %", "95 %", "99 %"], fontsize=8)
    axes.grid(visible=True, axis="x", color="0.92")
    if right:
        axes.legend(loc="lower right", fontsize=8)


def _timeline(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    begin_s = min((o.due_s for o in outcomes), default=0.0)
    right = [o for o in outcomes if o.error is None]
    wrong = [o for o in outcomes if o.error is not None]
    series = [
        ("end to end", _E2E, "o", [(o.due_s - begin_s, o.e2e_s) for o in right]),
        ("time to first token", _TTFT, "o", [(o.due_s - begin_s, o.ttft_s) for o in right if o.ttft_s is not None]),
        ("errors", _ERROR, "x", [(o.due_s - begin_s, o.e2e_s) for o in wrong]),
    ]
    for label, colour, marker, points in series:
        if points:
            at_s, took_s = zip(*points, strict=True)
            axes.scatter(
                at_s, [value * 1e3 for value in took_s], s=9, c=colour, marker=marker, label=label, linewidths=0.8
            )
    axes.set(xlabel="arrival, seconds from the start", ylabel="milliseconds")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="0.92")
    if outcomes:
        axes.legend(loc="upper right", fontsize=8)
