"""``StepPlan`` -> the tensors of one forward pass.

Owns: the layout of the ragged row, and of attention in PyTorch's operators (``native_attention`` lays out its own).
Decodes come first, for PyTorch's operators ordered by the length of what they read, so that each group of similar
length is a contiguous range of rows; prefill slices follow in the plan's order.
``StepInputs.first_rows`` leads from the plan's slices to their rows; the plan's own order carries no meaning
here.

Invariants: rows are a permutation of the plan's tokens; no tensor grows with the longest context times the
number of requests; prompts are copied as arrays, not token by token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from mixtral_serve.model.attention import AttentionStep, DecodeGroup, PrefillSlice, TorchStep
from mixtral_serve.model.kv_cache import KVCache, PagedKVCache
from mixtral_serve.model.native_attention import native_step
from scheduler.plan import ScheduledSlice, StepPlan

_GROUP_BYTES: Final = 4 << 20
"""Keys and values of one decode group: as much as the inner caches hold between the gather and the product."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One forward pass."""

    input_ids: torch.Tensor
    """[1, rows]"""
    positions: torch.Tensor
    """[1, rows]"""
    attention: AttentionStep
    fresh_blocks: tuple[int, ...]
    """Blocks that this step begins and leaves partly unwritten: to be cleared before anything is written."""
    first_rows: tuple[int, ...]
    """Row of the first token of each slice, aligned with ``plan.slices``."""


def build_inputs(plan: StepPlan, cache: KVCache, *, sliding_window: int | None) -> StepInputs:
    """Lay out ``plan`` (at least one slice) for ``cache``."""
    slices = plan.slices
    size = cache.block_size
    decodes = [i for i, s in enumerate(slices) if s.num_tokens == 1]
    spans: dict[int, tuple[int, int]] = {}
    if isinstance(cache, PagedKVCache):
        spans = {i: _visible_blocks(slices[i], size, sliding_window) for i in decodes}
        decodes.sort(key=lambda i: spans[i][0] - spans[i][1])
    order = decodes + [i for i, s in enumerate(slices) if s.num_tokens > 1]

    ids, positions, slots = array("i"), array("q"), array("q")
    fresh: list[int] = []
    first_rows = [0] * len(slices)
    for i in order:
        part = slices[i]
        first_rows[i] = len(ids)
        if part.num_tokens == 1:
            index, offset = divmod(part.start, size)
            ids.append(part.tokens[part.start])
            positions.append(part.start)
            slots.append(part.block_table[index] * size + offset)
            if offset == 0 and size > 1:
                fresh.append(part.block_table[index])
            continue
        end = part.start + part.num_tokens
        ids.extend(part.tokens[part.start : end])
        positions.extend(range(part.start, end))
        _add_slots(slots, part, size)
        if end % size and part.start <= end - end % size:
            fresh.append(part.block_table[end // size])
    attention: AttentionStep
    if not isinstance(cache, PagedKVCache):
        rows = [(first_rows[i], slices[i]) for i in order]
        attention = native_step(cache, rows, slots, sliding_window=sliding_window)
        fresh = []  # it never reads a slot that nobody wrote
    else:
        groups = _decode_groups([(slices[i], *spans[i]) for i in decodes], cache, sliding_window)
        prefills = tuple(_prefill(slices[i], first_rows[i], size, sliding_window) for i in order[len(decodes) :])
        attention = TorchStep(cache, torch.frombuffer(slots, dtype=torch.int64), groups, prefills)
    return StepInputs(
        input_ids=torch.frombuffer(ids, dtype=torch.int32).unsqueeze(0),
        positions=torch.frombuffer(positions, dtype=torch.int64).unsqueeze(0),
        attention=attention,
        fresh_blocks=tuple(fresh),
        first_rows=tuple(first_rows),
    )


def _visible_blocks(part: ScheduledSlice, size: int, window: int | None) -> tuple[int, int]:
    """First block, and the one after the last, that the slice's tokens may look into."""
    hidden = 0 if window is None else max(0, part.start - window + 1)
    return hidden // size, -(-(part.start + part.num_tokens) // size)


def _add_slots(slots: array[int], part: ScheduledSlice, size: int) -> None:
    """Append where each token of the slice is stored."""
    position, end = part.start, part.start + part.num_tokens
    while position < end:
        index, offset = divmod(position, size)
        num = min(size - offset, end - position)
        first = part.block_table[index] * size + offset
        slots.extend(range(first, first + num))
        position += num


def _prefill(part: ScheduledSlice, first_row: int, size: int, window: int | None) -> PrefillSlice:
    if part.start == 0:
        return PrefillSlice(first_row, part.num_tokens, 0, None, 0)
    first, end = _visible_blocks(part, size, window)
    return PrefillSlice(first_row, part.num_tokens, part.start, torch.tensor(part.block_table[first:end]), first * size)


def _decode_groups(
    rows: Sequence[tuple[ScheduledSlice, int, int]], cache: PagedKVCache, window: int | None
) -> tuple[DecodeGroup, ...]:
    """Cut ``rows`` (longest first; a slice, its first visible block and the end of them) into groups.

    A row joins while its own blocks are at least three quarters of the group's longest (or a few fewer), so padding
    stays a fraction of the work, and while the group's keys and values fit ``_GROUP_BYTES``.
    """
    dims = cache.keys.shape
    block_bytes = 2 * dims[2] * dims[3] * dims[4] * cache.compute_dtype.itemsize
    most = max(1, min(_GROUP_BYTES // block_bytes, cache.max_gather_blocks))
    groups: list[DecodeGroup] = []
    first = 0
    while first < len(rows):
        width = rows[first][2] - rows[first][1]
        least = min(width * 3 // 4, width - 2)
        end = first + 1
        while end < len(rows) and rows[end][2] - rows[end][1] >= least and (end + 1 - first) * width <= most:
            end += 1
        groups.append(_decode_group(rows[first:end], first, width, cache, window))
        first = end
    return tuple(groups)


def _decode_group(
    rows: Sequence[tuple[ScheduledSlice, int, int]], first_row: int, width: int, cache: PagedKVCache, window: int | None
) -> DecodeGroup:
    """One group of ``width`` blocks a row."""
    size = cache.block_size
    blocks, first_key, last_key = array("q"), array("q"), array("q")
    for part, first, end in rows:
        blocks.extend(part.block_table[first:end])
        blocks.extend([part.block_table[first]] * (width - (end - first)))
        last_key.append(part.start - first * size)
        first_key.append(0 if window is None else max(0, part.start - window + 1 - first * size))
    at = torch.arange(width * size)
    forbidden = at > torch.frombuffer(last_key, dtype=torch.int64).unsqueeze(1)
    if window is not None:
        forbidden |= at < torch.frombuffer(first_key, dtype=torch.int64).unsqueeze(1)
    bias = torch.zeros(forbidden.shape, dtype=cache.compute_dtype).masked_fill_(forbidden, float("-inf"))
    return DecodeGroup(first_row, len(rows), torch.frombuffer(blocks, dtype=torch.int64), bias[:, None, None, :])
