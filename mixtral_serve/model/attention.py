"""Attention over one ragged row: every scheduled token of every request side by side, each seeing only its own past.

Owns: the function registered with Transformers' ``AttentionInterface``, and attention in PyTorch's own operators. A
step travels through the model's forward as a keyword argument and knows how to attend: ``TorchStep`` here, or
``native_attention.NativeStep`` where the compiled kernels hold the cache. There is no global context.

In PyTorch, per layer: write the step's keys and values to their slots; then decodes (one row each), in groups of
similar context length, one product per group; then prefill slices, one request after another, a bounded number of
queries at a time. Grouped-query attention without copies: query heads that share a key head are the rows of one
product.

Invariants: a row reads only slots of its own request at positions up to its own. Where rows of different
lengths share a product, the shorter ones are padded with blocks of *their own* context under a mask of minus
infinity: what lies in anybody else's blocks, the null block included, is never touched.

Rejected: a name such as ``paged|...`` (Transformers refuses or replaces it); a second name for compiled attention (the
step, made from the cache it reads, cannot be at odds with it; a name in the model's config could); padding all rows to
the longest; ``repeat_kv``; one call per request (64 small calls per layer cost more than their products).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from mixtral_serve.model.kv_cache import PagedKVCache

ATTENTION: Final = "mixtral_paged"


class AttentionStep(Protocol):
    """What one step means for attention; the same for all layers."""

    def attend(
        self, layer: int, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float, window: int | None
    ) -> torch.Tensor:
        """Store the rows' keys and values, then attend.

        Args:
            layer: whose cache.
            rows: queries [rows, query_heads, head_dim], keys and values [rows, kv_heads, head_dim]; any strides.
            scaling: factor of the scores.
            window: how many positions a row sees, itself included; None: all.

        Returns:
            [rows, query_heads, head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token each, with contexts of about the same length."""

    first_row: int
    num_rows: int
    blocks: torch.Tensor
    """[num_rows * n]: n blocks per row, padded with the row's own first one."""
    bias: torch.Tensor
    """[num_rows, 1, 1, n * block_size]: 0 where the row may look, minus infinity elsewhere."""


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """Several tokens of one request."""

    first_row: int
    num_rows: int
    start: int
    """Absolute position of the first token."""
    blocks: torch.Tensor | None
    """[n]: blocks of the context; None where the slice itself is all the context there is."""
    blocks_start: int
    """Absolute position of the first slot of ``blocks`` (above 0 where a window hides what is before)."""


@dataclass(frozen=True, slots=True)
class TorchStep:
    """An ``AttentionStep`` in PyTorch's operators, over a ``PagedKVCache``."""

    cache: PagedKVCache
    slots: torch.Tensor
    """[rows]: where each row's key and value go."""
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSlice, ...]
    max_mask_elements: int = 4 << 20
    """Queries are cut so that one mask has at most so many elements (16 MB in fp32)."""

    def attend(
        self, layer: int, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float, window: int | None
    ) -> torch.Tensor:
        queries, keys, values = rows
        self.cache.write(layer, self.slots, keys, values)
        if self.cache.dtype is not queries.dtype:  # what is in this step is seen as it will be read in later ones
            keys, values = (tensor.to(self.cache.dtype).to(queries.dtype) for tensor in (keys, values))
        out = queries.new_empty(queries.shape)
        for group in self.decodes:
            span = slice(group.first_row, group.first_row + group.num_rows)
            context = self.cache.gather(layer, group.blocks)
            out[span] = _attend_decodes(queries[span], *context, group, scaling)
        for part in self.prefills:
            span = slice(part.first_row, part.first_row + part.num_rows)
            context = (keys[span], values[span]) if part.blocks is None else self.cache.gather(layer, part.blocks)
            at_once = max(1, self.max_mask_elements // (part.start - part.blocks_start + part.num_rows))
            for first in range(0, part.num_rows, at_once):
                chunk = slice(first, min(first + at_once, part.num_rows))
                seen = _Seen.of(part, chunk, window)
                out[span][chunk] = _attend_prefill(queries[span][chunk], *context, seen, scaling)
        return out


def register_attention() -> None:
    """Make ``ATTENTION`` known to Transformers. Doing so twice is fine."""
    AttentionInterface.register(ATTENTION, paged_attention_forward)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    *,
    step: AttentionStep,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature, over one ragged row.

    Args:
        module: the ``MixtralAttention`` that asks; its ``layer_idx`` names the layer.
        query: [1, query_heads, rows, head_dim], rotated.
        key: [1, kv_heads, rows, head_dim], rotated.
        value: [1, kv_heads, rows, head_dim].
        attention_mask: None; Transformers makes no mask for a name it does not know.
        scaling: factor of the scores.
        sliding_window: how many positions a token sees, itself included.
        step: the step's layout.

    Returns:
        [1, rows, query_heads, head_dim] and no weights.
    """
    assert attention_mask is None, "a ragged row has no rectangular mask"
    layer: int = module.layer_idx  # type: ignore[assignment]  # a module may answer anything
    rows = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    return step.attend(layer, rows, scaling, sliding_window).unsqueeze(0), None


def _attend_decodes(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, scaling: float
) -> torch.Tensor:
    """``queries`` [rows, query_heads, head_dim] against ``keys`` and ``values`` [rows * n, kv_heads, head_dim]."""
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    by_row = (num_rows, -1, num_kv_heads, head_dim)
    attended = functional.scaled_dot_product_attention(
        queries.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
        keys.view(by_row).transpose(1, 2),
        values.view(by_row).transpose(1, 2),
        attn_mask=group.bias,
        scale=scaling,
    )
    return attended.reshape(num_rows, num_heads, head_dim)


@dataclass(frozen=True, slots=True)
class _Seen:
    """Which keys a run of queries may see, in positions relative to the first gathered one."""

    first_query: int
    num_queries: int
    first_key: int
    window: int | None

    @classmethod
    def of(cls, part: PrefillSlice, chunk: slice, window: int | None) -> _Seen:
        first = part.start - part.blocks_start + chunk.start
        return cls(first, chunk.stop - chunk.start, 0 if window is None else max(0, first - window + 1), window)

    @property
    def keys(self) -> slice:
        return slice(self.first_key, self.first_query + self.num_queries)

    @property
    def is_plain_causal(self) -> bool:
        """Whether queries and keys are the same positions and no window cuts in."""
        return self.first_query == 0 and (self.window is None or self.num_queries <= self.window)

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """[queries, keys]: minus infinity where a query must not look."""
        at = torch.arange(self.first_query, self.keys.stop).unsqueeze(1)
        key = torch.arange(self.keys.start, self.keys.stop).unsqueeze(0)
        forbidden = key > at
        if self.window is not None:
            forbidden |= key <= at - self.window
        return torch.zeros(forbidden.shape, dtype=dtype).masked_fill_(forbidden, float("-inf"))


def _attend_prefill(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: _Seen, scaling: float
) -> torch.Tensor:
    """``queries`` [rows, query_heads, head_dim] against ``keys`` and ``values`` [context, kv_heads, head_dim]."""
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    per_kv_head = num_heads // num_kv_heads
    keys, values = keys[seen.keys], values[seen.keys]
    # Key heads are the batch; the query heads of one key head are its heads, all with the same keys (stride 0).
    shared = (num_kv_heads, per_kv_head, keys.shape[0], head_dim)
    attended = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).reshape(num_kv_heads, per_kv_head, num_rows, head_dim),
        keys.transpose(0, 1).unsqueeze(1).expand(shared),
        values.transpose(0, 1).unsqueeze(1).expand(shared),
        attn_mask=None if seen.is_plain_causal else seen.bias(queries.dtype),
        is_causal=seen.is_plain_causal,
        scale=scaling,
    )
    return attended.reshape(num_heads, num_rows, head_dim).transpose(0, 1)
