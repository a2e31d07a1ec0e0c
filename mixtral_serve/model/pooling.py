"""Embeddings: the mean of a prompt's last hidden states.

The sum so far travels with the request (``ScheduledSlice.embedding``), so that a prompt may be computed in any
chunks and the runner keeps nothing. A slice that starts at position 0 starts over, which is what a preempted
request does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from scheduler.plan import ScheduledSlice


@dataclass(frozen=True, slots=True)
class PartialEmbedding:
    """What is known after some of the prompt."""

    total: torch.Tensor
    """[hidden], float64: sum of the hidden states so far."""
    num_tokens: int


def pool(part: ScheduledSlice, hidden: torch.Tensor) -> PartialEmbedding | tuple[float, ...] | None:
    """The embedding after this slice; finished after the request's last known token.

    Args:
        part: the slice; its ``embedding`` is what the slice before returned.
        hidden: [slice tokens, hidden], after the final norm.

    Returns:
        None where the hidden states are not finite, or cancel out to a vector without a direction: what is handed
        out can be brought to length one.
    """
    total = hidden.double().sum(dim=0)
    num_tokens = part.num_tokens
    if part.start > 0:
        before = part.embedding
        assert isinstance(before, PartialEmbedding), "a later slice carries the sum of those before"
        assert before.num_tokens == part.start, f"{before.num_tokens} tokens summed, the slice starts at {part.start}"
        total = before.total + total
        num_tokens += before.num_tokens
    if num_tokens < len(part.tokens):
        return PartialEmbedding(total, num_tokens) if bool(torch.isfinite(total).all()) else None
    mean = total / num_tokens
    return tuple(mean.tolist()) if 0 < float(torch.linalg.vector_norm(mean)) < math.inf else None
