"""What is measured and what came of it: rows, the plan of a run, samples, and the reasons for what is missing.

Owns: ``Row``, ``Plan``, ``Sample``, ``Results`` and the ratios between contenders. Pure.

A ratio is the median over the rounds of each round's own ratio: both were then measured within minutes of each
other, so a machine that drifts moves both. A ratio of two medians would compare different moments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

MAX_STEPS: Final = 64
"""Most steps of one decode measurement."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of work: a decode step of ``size`` sequences, or a fresh prompt of ``size`` tokens."""

    kind: str
    """``decode`` or ``prefill``."""
    size: int

    def __str__(self) -> str:
        return f"batch {self.size}" if self.kind == "decode" else f"prefill {self.size}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how long."""

    rows: tuple[Row, ...]
    num_rounds: int
    context: int
    """Prompt tokens of each decoding sequence."""
    seconds: float
    """A decode measurement lasts about so long, within bounds on its steps."""

    @property
    def most_sequences(self) -> int:
        """That decode at once."""
        return max((row.size for row in self.rows if row.kind == "decode"), default=1)

    @property
    def most_positions(self) -> int:
        """Of one sequence, with room for engines whose sequences start one after another."""
        decode = self.context + MAX_STEPS + self.most_sequences + 8
        return max([decode, *(row.size + 8 for row in self.rows if row.kind == "prefill")])


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    round: int
    seconds: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens, or prompt tokens."""
        return self.tokens / self.seconds


@dataclass(slots=True)
class Results:
    """Everything that was measured, and why the rest was not."""

    samples: dict[tuple[str, Row], list[Sample]] = field(default_factory=dict)
    """By contender and row, in the order of the rounds."""
    row_failures: dict[tuple[str, Row], str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Contender -> why nothing of it could be measured."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    resident_bytes: dict[str, int] = field(default_factory=dict)
    """Contender -> the most that its worker held after a measurement."""
    bandwidth: list[float] = field(default_factory=list)
    """Bytes per second that a plain read got, once a round."""

    def tokens_per_s(self, name: str, row: Row) -> float | None:
        """Median over the rounds; None if it was not measured."""
        samples = self.samples.get((name, row))
        return median(sample.tokens_per_s for sample in samples) if samples else None

    def ratio(self, name: str, other: str, row: Row) -> float | None:
        """How many times faster ``name`` is than ``other``; None unless both were measured in some round."""
        mine = {sample.round: sample.tokens_per_s for sample in self.samples.get((name, row), [])}
        theirs = {sample.round: sample.tokens_per_s for sample in self.samples.get((other, row), [])}
        ratios = [mine[number] / theirs[number] for number in mine.keys() & theirs.keys()]
        return median(ratios) if ratios else None

    def reason(self, name: str) -> str | None:
        """Why nothing of a contender was measured; None if something was."""
        if any(measured == name for measured, _ in self.samples):
            return None
        if name in self.failures:
            return self.failures[name]
        return next((reason for (failed, _), reason in self.row_failures.items() if failed == name), "not measured")
