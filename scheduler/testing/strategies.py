"""Hypothesis strategies for small worlds, where most mistakes show.

Blocks of 1 to 4 tokens, pools of 3 to 12 blocks, prompts cut from a few common stems: prefixes collide, blocks
run out and every boundary is near. A mistake that needs a large world is rare; one that needs a crowded one is
not. Sizes are drawn to fit the pool, since a world that refuses everybody tests nothing; whether the plays really
get into trouble is measured (``scheduler.testing.reach``) and required by a test.
"""

from __future__ import annotations

from array import array
from typing import Final

from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.prefix_cache import HashFunction, sha256_digest
from scheduler.request import TOKEN_TYPECODE, Request, RequestId, RequestKind, StopRule

TENANTS: Final = ("", "", "", "acme")
STEMS: Final = ((1,) * 16, (1, 2) * 8)
"""What prompts begin with."""
MAX_PROMPT_TOKENS: Final = 16
MAX_OUTPUT_TOKENS: Final = 12


def four_bit_digest(data: bytes) -> bytes:
    """A hash with 16 values: collisions everywhere, so that only the comparison of tokens can be right."""
    return bytes([sha256_digest(data)[0] & 0x0F])


def hash_functions() -> st.SearchStrategy[HashFunction]:
    """The real hash, or one that collides."""
    return st.sampled_from([sha256_digest, sha256_digest, four_bit_digest])


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Small, crowded scheduler configurations."""
    max_num_seqs = draw(st.sampled_from([3, 2, 4, 5, 5, 1]))
    return SchedulerConfig(
        num_blocks=draw(st.integers(4, 12)),
        block_size=draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 10)),
        max_model_len=draw(st.sampled_from([40, 40, 12])),
        max_prefill_chunk=draw(st.one_of(st.none(), st.integers(1, 5))),
        max_waiting=draw(st.sampled_from([100, 100, 3])),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        max_preemptions=draw(st.sampled_from([1, 2, 3, 0])),
        max_overtakes=draw(st.sampled_from([3, 0, 1, 20])),
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str, now: float, limit: int) -> Request:
    """One request for a world where one request may hold ``limit`` tokens; a few ask for more than that."""
    kind = draw(st.sampled_from([RequestKind.GENERATE] * 6 + [RequestKind.SCORE, RequestKind.EMBED]))
    generates = kind is RequestKind.GENERATE and limit > 1
    room = draw(st.sampled_from([limit] * 11 + [limit + 1]))
    max_tokens = draw(st.sampled_from([MAX_OUTPUT_TOKENS, draw(st.integers(1, MAX_OUTPUT_TOKENS))])) if generates else 0
    max_tokens = min(max_tokens, room - 1)
    num_prompt_tokens = min(room - max_tokens, MAX_PROMPT_TOKENS)
    if room <= limit:
        # Mostly short, so that several run at once and then grow until blocks are short.
        num_prompt_tokens = draw(st.integers(1, draw(st.sampled_from([num_prompt_tokens, -(-num_prompt_tokens // 3)]))))
    num_own_tokens = draw(st.integers(0, min(2, num_prompt_tokens)))
    stem = draw(st.sampled_from(STEMS))
    tail = draw(st.lists(st.integers(1, 2), min_size=num_own_tokens, max_size=num_own_tokens))
    patience_s = draw(st.sampled_from([None, None, None, 1.0, 3.0]))
    return Request(
        id=RequestId(request_id),
        prompt=array(TOKEN_TYPECODE, [*stem[: num_prompt_tokens - num_own_tokens], *tail]),
        stop=StopRule(
            max_tokens=max_tokens,
            stop_token_ids=draw(st.sampled_from([frozenset[int](), frozenset({0})])),
            min_tokens=min(max_tokens, draw(st.sampled_from([0, 0, 3]))),
        ),
        arrival_s=now,
        # Who generates although it may not have a token warms the prefix cache.
        kind=kind if generates else draw(st.sampled_from([RequestKind.SCORE, RequestKind.EMBED, RequestKind.GENERATE])),
        priority=draw(st.integers(-2, 2)),
        tenant=draw(st.sampled_from(TENANTS)),
        cache_salt=draw(st.sampled_from(["", "", "", "x"])),
        deadline_s=None if patience_s is None else now + patience_s,
        prompt_logprobs=draw(st.sampled_from([False, False, False, True])),
    )
