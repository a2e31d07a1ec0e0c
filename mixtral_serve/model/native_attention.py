"""A step's attention in the compiled kernels: the plan's slices as the integers that the compiled kernels take.

Owns: how slices are cut. A prefill slice becomes pieces of up to 64 query rows of one key head (positions times query
heads that share it), each of which walks through all it may see. A decode is one piece; where its context is longer
than one split and there is room for partial results, it is one piece per split, so that threads share a long context.

Invariants: how a slice is cut changes who computes what and when, never a bit of the result: splits lie at fixed
positions and are combined in ascending order in any case.

Rejected: splits by number of threads; a partial result for every piece of a prefill (grows with rows times context).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import torch

from mixtral_serve.kernels.native_attention import (
    MAX_PIECE_ROWS,
    MERGE_FIELDS,
    PIECE_FIELDS,
    SPLIT_KEYS,
    AttentionCall,
)
from mixtral_serve.model.native_kv_cache import NativeKVCache
from scheduler.plan import ScheduledSlice


@dataclass(frozen=True, slots=True)
class NativeStep:
    """What one step means for attention; the same for all layers."""

    cache: NativeKVCache
    integers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    """Slots, tables, pieces, merges."""
    window: int | None
    """The sliding window that the pieces were cut for."""
    call: AttentionCall
    """The same for the compiled kernels, but for the rows and the layer; ``cache.layer_addresses`` has what differs."""

    def attend(
        self, layer: int, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float, window: int | None
    ) -> torch.Tensor:
        """Store keys and values, attend; see ``attention.AttentionStep``."""
        assert window == self.window, "the model and the plan disagree about the window"
        return self.cache.attend(layer, rows, self.integers, window=window or 0, scaling=scaling)


def native_step(
    cache: NativeKVCache,
    rows: Sequence[tuple[int, ScheduledSlice]],
    slots: array[int],
    *,
    sliding_window: int | None,
) -> NativeStep:
    """Cut slices, each with the row of its first token; ``slots`` says where each row's key and value go."""
    cut = _Cut(cache, sliding_window)
    for first_row, part in rows:
        cut.add(first_row, part)
    integers = (_tensor(slots), *cut.tensors())
    return NativeStep(cache, integers, sliding_window, cache.call(integers, window=sliding_window or 0))


class _Cut:
    """Collects tables, pieces and merges."""

    def __init__(self, cache: NativeKVCache, window: int | None) -> None:
        self._block_size = cache.block_size
        self._max_partials = cache.max_partials
        self._window = window
        self._per_kv_head = per_kv_head = cache.num_query_heads_per_kv_head
        self._decode_rows = [
            (first, min(MAX_PIECE_ROWS, per_kv_head - first)) for first in range(0, per_kv_head, MAX_PIECE_ROWS)
        ]
        """Query rows of one token and one key head, cut: where a piece begins, and how many it has.

        One piece, or few where very many query heads share a key head.
        """
        self._tables = array("q")
        self._pieces: list[tuple[int, tuple[int, ...]]] = []
        """What a piece costs (keys times rows), and its fields."""
        self._merges = array("q")
        self._num_partials = 0

    def add(self, first_row: int, part: ScheduledSlice) -> None:
        start, num_tokens, size = part.start, part.num_tokens, self._block_size
        first_key = self._first_key(start)
        first_block = first_key // size
        table = len(self._tables) - first_block
        self._tables.extend(part.block_table[first_block : -(-(start + num_tokens) // size)])
        if num_tokens > 1:
            self._add_rows(first_row, part, table)
        elif start // SPLIT_KEYS == first_key // SPLIT_KEYS or not self._add_splits(first_row, start, table, first_key):
            num_keys = start + 1 - first_key
            for first, num in self._decode_rows:
                self._pieces.append((num * num_keys, (first_row, start, table, first, num, -1, -1)))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tables, pieces (the longest first: the short ones fill the gaps at the end), merges."""
        self._pieces.sort(key=itemgetter(0), reverse=True)
        pieces = array("q", chain.from_iterable(map(itemgetter(1), self._pieces)))
        return _tensor(self._tables), _tensor(pieces, PIECE_FIELDS), _tensor(self._merges, MERGE_FIELDS)

    def _first_key(self, position: int) -> int:
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _add_rows(self, first_row: int, part: ScheduledSlice, table: int) -> None:
        """Cut a prefill into pieces."""
        per_kv_head = self._per_kv_head
        end = part.num_tokens * per_kv_head
        for first in range(0, end, MAX_PIECE_ROWS):
            num = min(MAX_PIECE_ROWS, end - first)
            begins, ends = part.start + first // per_kv_head, part.start + (first + num - 1) // per_kv_head
            cost = num * (ends + 1 - self._first_key(begins))
            self._pieces.append((cost, (first_row, part.start, table, first, num, -1, -1)))

    def _add_splits(self, row: int, position: int, table: int, first_key: int) -> bool:
        """Cut a decode of several splits at them, if their results find room."""
        first_split, end_split = first_key // SPLIT_KEYS, position // SPLIT_KEYS + 1
        num_splits = end_split - first_split
        if self._num_partials + num_splits > self._max_partials:
            return False
        for partial, split in enumerate(range(first_split, end_split), self._num_partials):
            for first, num in self._decode_rows:
                self._pieces.append((num * SPLIT_KEYS, (row, position, table, first, num, split, partial)))
        self._merges.extend((row, self._num_partials, num_splits))
        self._num_partials += num_splits
        return True


def _tensor(values: array[int], num_fields: int | None = None) -> torch.Tensor:
    """[n], or [n / num_fields, num_fields]."""
    if not values:
        return torch.empty((0,) if num_fields is None else (0, num_fields), dtype=torch.int64)
    flat = torch.frombuffer(values, dtype=torch.int64)
    return flat if num_fields is None else flat.view(-1, num_fields)
