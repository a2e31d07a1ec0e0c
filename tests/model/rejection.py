"""The oracle of draws from the whole vocabulary: what ``model/draws.py`` says of them, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

CHUNK = 64
_WORD = (1 << 64) - 1


class Drawn(NamedTuple):
    """A token, and how near any decision on the way to it was to the other outcome."""

    token: int
    margin: float


def split_mix(state: int) -> Iterator[int]:
    """The words of SplitMix64 from ``state`` on."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
        yield word ^ (word >> 31)


def fraction(word: int) -> float:
    """The upper 53 bits."""
    return (word >> 11) * 2.0**-53


def draw_by_rejection(logits: Sequence[float], temperature: float, draw: float) -> Drawn:
    """From all of ``logits``, of which some may be minus infinity, but not all."""
    maxima = [max(logits[first : first + CHUNK]) for first in range(0, len(logits), CHUNK)]
    bounds = [math.exp((largest - max(maxima)) / temperature) for largest in maxima]
    total = math.fsum(bounds)
    words = split_mix(int(draw * 2**53))
    margin = math.inf
    while True:
        target = fraction(next(words)) * total
        chunk, reached = -1, 0.0
        while reached <= target:
            chunk += 1
            margin = min(margin, abs(reached - target) if chunk else math.inf)
            reached += bounds[chunk]
        margin = min(margin, reached - target)
        word = next(words)
        token = CHUNK * chunk + (word >> 58)
        if token >= len(logits):
            continue
        share = math.exp((logits[token] - maxima[chunk]) / temperature)
        accepted = fraction((word << 6) & _WORD)
        if share < 1:  # at 1 there is nothing to round
            margin = min(margin, abs(share - accepted))
        if accepted < share:
            return Drawn(token, margin)
