"""Hypothesis strategies for small worlds, where most mistakes show.

Blocks of 1 to 4 tokens, pools of 3 to 12 blocks, an alphabet of two letters: prefixes collide, blocks run out
and every boundary is near. A mistake that needs a large world is rare; one that needs a crowded one is not.
"""

from __future__ import annotations

from array import array

from hypothesis import strategies as st

from scheduler.config import SchedulerConfig
from scheduler.prefix_cache import HashFunction, sha256_digest
from scheduler.request import TOKEN_TYPECODE, Request, RequestId, RequestKind, StopRule

TENANTS = ("", "acme", "zenith")


def four_bit_digest(data: bytes) -> bytes:
    """A hash with 16 values: collisions everywhere, so that only the comparison of tokens can be right."""
    return bytes([sha256_digest(data)[0] & 0x0F])


def hash_functions() -> st.SearchStrategy[HashFunction]:
    """The real hash, or one that collides."""
    return st.sampled_from([sha256_digest, four_bit_digest])


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Small, crowded scheduler configurations."""
    max_num_seqs = draw(st.integers(1, 5))
    return SchedulerConfig(
        num_blocks=draw(st.integers(3, 12)),
        block_size=draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 8)),
        max_model_len=draw(st.sampled_from([12, 40])),
        max_prefill_chunk=draw(st.one_of(st.none(), st.integers(1, 5))),
        max_waiting=draw(st.sampled_from([3, 100])),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        max_preemptions=draw(st.integers(0, 3)),
        max_overtakes=draw(st.integers(0, 3)),
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str, now: float) -> Request:
    """One request for a small world; some are too large for it on purpose."""
    kind = draw(st.sampled_from([RequestKind.GENERATE] * 6 + [RequestKind.SCORE, RequestKind.EMBED]))
    max_tokens = draw(st.integers(1, 8)) if kind is RequestKind.GENERATE else 0
    patience_s = draw(st.sampled_from([None, None, None, 1.0, 5.0]))
    return Request(
        id=RequestId(request_id),
        prompt=array(TOKEN_TYPECODE, draw(st.lists(st.integers(1, 2), min_size=1, max_size=14))),
        stop=StopRule(
            max_tokens=max_tokens,
            stop_token_ids=draw(st.sampled_from([frozenset[int](), frozenset({0})])),
            min_tokens=min(max_tokens, draw(st.sampled_from([0, 0, 2]))),
        ),
        arrival_s=now,
        kind=kind,
        priority=draw(st.integers(-2, 2)),
        tenant=draw(st.sampled_from(TENANTS)),
        cache_salt=draw(st.sampled_from(["", "", "x"])),
        deadline_s=None if patience_s is None else now + patience_s,
        prompt_logprobs=draw(st.sampled_from([False, False, True])),
    )
