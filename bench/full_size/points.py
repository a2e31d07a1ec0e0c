"""The grid: which steps are measured, and each of them as a plan that the runner can run.

Owns: ``Point``, the points in the order of their importance, and ``Blocks``. A plan is made by hand: its block tables
lead into the real cache, where each request has blocks of its own, in no order, as after hours of serving. What the
blocks hold does not change what a step costs, so contexts are not computed first.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from mixtral_serve.contract import RunBatch, SamplingParams
from scheduler.config import SchedulerConfig
from scheduler.plan import ScheduledSlice, StepPlan
from scheduler.request import TOKEN_TYPECODE, BlockId, RequestId

SHORT: Final = 64
"""Tokens of a short context."""
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
CHUNKS: Final = (32, 64, 128, 256, 512)
CACHED_PREFIX: Final = 480
"""Of a standard request: its prompt is computed in one chunk behind so many cached tokens."""
FIRST_TOKEN_ID: Final = 300
"""Control tokens and bytes stand below it."""


@dataclass(frozen=True, slots=True)
class Point:
    """One step: so many requests decode, and one may bring a chunk of its prompt."""

    num_decodes: int = 0
    context: int = 0
    """Tokens in the cache of each request that decodes."""
    chunk: int = 0
    """Prompt tokens of one more request."""
    chunk_context: int = 0
    """Tokens of it that are in the cache already."""

    def __str__(self) -> str:
        parts = []
        if self.num_decodes:
            parts.append(f"{self.num_decodes} decode{'s' * (self.num_decodes > 1)} at {self.context}")
        if self.chunk:
            parts.append(f"{self.chunk} prompt tokens at {self.chunk_context}")
        return " + ".join(parts)

    @property
    def num_rows(self) -> int:
        """Tokens that are computed."""
        return self.num_decodes + self.chunk

    def num_blocks(self, block_size: int) -> int:
        """Blocks that its requests hold."""
        per_decode = -(-(self.context + 1) // block_size)
        return self.num_decodes * per_decode + -(-(self.chunk_context + self.chunk) // block_size)

    def obstacle(self, config: SchedulerConfig) -> str | None:
        """Why the engine could never run such a step; None if it could."""
        if self.num_rows > config.max_num_batched_tokens:
            return f"a step has at most {config.max_num_batched_tokens} tokens"
        if self.num_decodes + (self.chunk > 0) > config.max_num_seqs:
            return f"at most {config.max_num_seqs} requests run at once"
        if max(self.context + 1, self.chunk_context + self.chunk) > config.max_model_len:
            return f"a request has at most {config.max_model_len} tokens"
        needed = self.num_blocks(config.block_size)
        if needed > config.num_blocks - 1:
            return f"it takes {needed} blocks of KV cache, there are {config.num_blocks - 1}"
        return None


def points() -> Iterator[Point]:
    """The grid, most important first, each point once."""
    yield from dict.fromkeys(_by_importance())


def _by_importance() -> Iterator[Point]:
    yield from (Point(batch, 512) for batch in (1, 8, 32, 64, 4, 16, 2))
    yield from (Point(chunk=64), Point(chunk=512), Point(chunk=32, chunk_context=CACHED_PREFIX))
    yield from (Point(batch, 512, 32, CACHED_PREFIX) for batch in (8, 32, 2, 16))
    yield from (Point(batch, SHORT, 64) for batch in (8, 32, 2, 16))
    yield from (Point(chunk=chunk) for chunk in CHUNKS)
    yield from (Point(batch, 512, 256) for batch in (8, 32, 63))
    yield from (Point(batch, SHORT) for batch in BATCHES)
    yield from (Point(batch, 4096) for batch in (1, 8, 32, 4, 16, 64, 2))
    yield from (Point(chunk=chunk, chunk_context=context) for context, chunk in product((512, 4096), (64, 512, 256)))
    yield from (Point(batch, 512, chunk, 512) for chunk, batch in product((64, 128), (4, 16, 63)))
    yield from (Point(batch, 4096, 128, 4096) for batch in (8, 32))


class Blocks:
    """Hands out block ids of a pool in no order; a plan takes all that it needs, the next plan starts anew."""

    def __init__(self, num_blocks: int, block_size: int, *, seed: int = 0) -> None:
        self.block_size = block_size
        self._ids = [BlockId(number) for number in range(1, num_blocks)]
        random.Random(seed).shuffle(self._ids)

    def tables(self, lengths: Sequence[int]) -> list[list[BlockId]]:
        """Tables for requests with so many tokens; no block is in two of them."""
        tables, first = [], 0
        for length in lengths:
            end = first + -(-length // self.block_size)
            tables.append(self._ids[first:end])
            first = end
        assert first <= len(self._ids), "a point that does not fit is not planned"
        return tables


def batch_of(point: Point, blocks: Blocks, *, vocab_size: int, seed: int = 0) -> RunBatch:
    """``point`` as the engine would hand it to the runner; tokens are random, every request samples."""
    generator = random.Random(f"{seed}/{point}")
    sizes = [(point.context, 1)] * point.num_decodes
    if point.chunk:
        sizes.append((point.chunk_context, point.chunk))
    tables = blocks.tables([start + num_tokens for start, num_tokens in sizes])
    slices = []
    for number, ((start, num_tokens), table) in enumerate(zip(sizes, tables, strict=True)):
        end = start + num_tokens
        slices.append(
            ScheduledSlice(
                RequestId(str(number)),
                start,
                num_tokens,
                tokens=array(TOKEN_TYPECODE, generator.choices(range(FIRST_TOKEN_ID % vocab_size, vocab_size), k=end)),
                block_table=table,
                num_logits=1,
                samples=True,
                num_output_tokens=0 if num_tokens > 1 else 1,
            )
        )
    plan = StepPlan(step_id=0, slices=tuple(slices), events=())
    return RunBatch(plan, tuple(SamplingParams(seed=number) for number in range(len(slices))))
