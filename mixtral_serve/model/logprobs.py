"""Log-probabilities of raw logits: of given tokens, and of the most likely alternatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixtral_serve.model.likeliest import top
from scheduler.events import TokenLogprob


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """One entry per row.

    Args:
        logits: [rows, vocab], raw, finite, fp32.
        token_ids: the token of each row.
        num_top: alternatives wanted for each row; equal ones come in ascending id.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen: list[float] = logprobs.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(num_top, default=0), logits.shape[1])
    if most == 0:
        return tuple(TokenLogprob(*pair) for pair in zip(token_ids, chosen, strict=True))
    largest, columns = top(logprobs, most)
    values: list[list[float]] = largest.tolist()
    ids: list[list[int]] = columns.tolist()
    entries = []
    for row, (token_id, logprob) in enumerate(zip(token_ids, chosen, strict=True)):
        pairs = sorted(zip(ids[row], values[row], strict=True), key=lambda pair: (-pair[1], pair[0]))
        entries.append(TokenLogprob(token_id, logprob, tuple(pairs[: num_top[row]])))
    return tuple(entries)
