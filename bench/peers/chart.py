"""The picture of a comparison: tokens per second, one group of bars per row, on a logarithmic scale.

Owns: ``draw``. Matplotlib's object interface only, which has no global state and needs no display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.peers.contenders import Entry
from bench.peers.results import Plan, Results

_OURS = ("#7f2704", "#d94801", "#f16913", "#fdae6b")
_OTHERS = ("#08306b", "#2171b5", "#00441b", "#6baed6", "#9ecae1", "#238b45", "#74c476")


def draw(path: Path, plan: Plan, entries: Sequence[Entry], results: Results, *, title: str) -> None:
    """Write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    shown = [entry for entry in entries if results.reason(entry.name) is None]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / max(1, len(shown))
    colours = {True: iter(_OURS * len(shown)), False: iter(_OTHERS * len(shown))}
    for number, entry in enumerate(shown):
        values = [results.tokens_per_s(entry.name, row) for row in plan.rows]
        places = [i + (number - (len(shown) - 1) / 2) * width for i in range(len(values))]
        axes.bar(
            [place for place, value in zip(places, values, strict=True) if value is not None],
            [value for value in values if value is not None],
            width,
            label=entry.name,
            color=next(colours[entry.is_ours]),
        )
    axes.set(yscale="log", ylabel="tokens per second")
    axes.set_xticks(range(len(plan.rows)), [str(row) for row in plan.rows])
    axes.grid(visible=True, axis="y", which="both", color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=11)
    if shown:
        axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110, format="png")
