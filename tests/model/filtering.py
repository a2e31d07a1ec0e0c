"""The oracle of draws from what filters leave: what ``model/sampler.py`` says they mean, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from mixtral_serve.model.draws import Asked


def draw_filtered(logits: Sequence[float], asked: Asked) -> int:
    """From what the filters of ``asked`` leave of ``logits``, of which some may be minus infinity, but not all."""
    peak = max(logits)
    weights = [math.exp((x - peak) / asked.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    left = order[: asked.top_k or len(order)]
    kept = left
    if asked.top_p < 1:
        target = asked.top_p * math.fsum(weights[token] for token in left)
        reached = list(accumulate(weights[token] for token in left))
        num = next((n for n, sum_of_n in enumerate(reached, 1) if sum_of_n >= target), len(left))
        kept = left[:num]
    if asked.min_p > 0:
        kept = kept[:1] + [token for token in kept[1:] if weights[token] >= asked.min_p]
    kept.sort()
    reached = list(accumulate(weights[token] for token in kept))
    target = asked.draw * reached[-1]
    return next(token for token, sum_up_to_it in zip(kept, reached, strict=True) if sum_up_to_it > target)
