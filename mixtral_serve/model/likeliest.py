"""The largest logit of each row, and the k largest, over a wide vocabulary.

PyTorch's ``argmax`` and ``topk`` walk a row element by element on a CPU; the maxima of short pieces of a row take a
twentieth of the time or less. So a row is cut into chunks, the chunks are compared by their maxima, and
only the chunks that can matter are looked into.

Why that loses nothing: the k largest values of a row lie in at most k chunks, and a chunk that is not among the k
with the largest maxima cannot hold a value larger than any of those k maxima. With equal values another chunk may be
chosen, so the *ids* of equals at the very end of the k are arbitrary, as they are for ``torch.topk``.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional

from mixtral_serve.model.wide_rows import chunk_maxima

_ARGMAX_CHUNK: Final = 256
_TOP_CHUNKS: Final = (64, 8)
"""Chunk lengths of the successive cuts; each one divides those before it."""


def largest(logits: torch.Tensor) -> torch.Tensor:
    """[rows]: column of the largest value of ``logits`` [rows, vocab], the lowest among equals. No NaN allowed."""
    padded = chunked(logits, _ARGMAX_CHUNK)
    chunk = chunk_maxima(padded, _ARGMAX_CHUNK).argmax(dim=-1)
    chunks = padded.view(logits.shape[0], -1, _ARGMAX_CHUNK)
    within = chunks[torch.arange(chunks.shape[0]), chunk].argmax(dim=-1)
    return chunk * _ARGMAX_CHUNK + within


def top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns, both [rows, k], of the k largest values in descending order. No NaN allowed.

    The column of a value of minus infinity means nothing; it may lie past the vocabulary.
    """
    values, columns = chunked(logits, _TOP_CHUNKS[0]), None
    for length in _TOP_CHUNKS:
        if values.shape[1] // length <= k:  # every chunk may matter
            break
        kept = chunk_maxima(values, length).topk(k, sorted=False).indices
        rows = torch.arange(values.shape[0]).unsqueeze(1) * (values.shape[1] // length)
        values = values.reshape(-1, length).index_select(0, (kept + rows).flatten()).view(values.shape[0], -1)
        here = (kept.unsqueeze(2) * length + torch.arange(length)).flatten(1)
        columns = here if columns is None else columns.gather(1, here)
    found = values.topk(k, dim=-1)
    return found.values, found.indices if columns is None else columns.gather(1, found.indices)


def chunked(logits: torch.Tensor, length: int) -> torch.Tensor:
    """``logits``, dense, with columns of minus infinity up to a multiple of ``length``, copied only if need be."""
    missing = -logits.shape[1] % length
    return functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits.contiguous()
