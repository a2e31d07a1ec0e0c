"""``storm``: a long, crowded, seeded play in which everything goes wrong often.

Hypothesis finds short counter-examples and shrinks them; it is slow at piling up trouble. A storm is the other
half: hundreds of requests through one small world, every law checked after every move, and the same seed gives the
same storm. It takes some thousand steps per second; ``World.reach`` tells what it met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from scheduler.config import SchedulerConfig
from scheduler.lifecycle import FinishReason
from scheduler.policies.base import Policy
from scheduler.prefix_cache import sha256_digest
from scheduler.request import Request, RequestId, RequestKind, StopRule
from scheduler.testing.fake_runner import Fault
from scheduler.testing.strategies import MAX_OUTPUT_TOKENS, STEMS, TENANTS, four_bit_digest
from scheduler.testing.world import World, compact


def storm(new_policy: Callable[[], Policy], seed: int, *, num_requests: int = 100) -> World:
    """Play one storm to its end. Returns the settled world.

    Raises:
        InvariantError: a law does not hold.
    """
    try:
        return _play(new_policy, Random(seed), num_requests)
    except Exception as error:
        error.add_note(f"in storm({new_policy.__name__}, {seed}, num_requests={num_requests})")
        raise


def _play(new_policy: Callable[[], Policy], random: Random, num_requests: int) -> World:
    world = World(
        stormy_config(random),
        new_policy(),
        hash_function=random.choice([sha256_digest, sha256_digest, four_bit_digest]),
        budget_bytes=random.choice([10**9, 150_000]),
    )
    num_left = num_requests
    while num_left > 0:
        if random.random() < 0.2:
            num_left -= _add_some(world, random, num_requests - num_left)
        elif random.random() < 0.15:
            _disturb(world, random)
        else:
            world.step()
            world.clock.advance(random.choice([0.0, 0.1]))
    world.settle()
    return world


def stormy_config(random: Random) -> SchedulerConfig:
    """A crowded world: many seats, few blocks."""
    max_num_seqs = random.randint(2, 6)
    return SchedulerConfig(
        num_blocks=random.randint(6, 14),
        block_size=random.randint(1, 3),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + random.randint(0, 12),
        max_model_len=random.choice([16, 40]),
        max_prefill_chunk=random.choice([None, None, 3]),
        max_waiting=random.choice([8, 100]),
        enable_prefix_caching=random.random() < 0.9,
        max_preemptions=random.choice([0, 1, 1, 2, 3]),
        max_overtakes=random.choice([0, 2, 20]),
    )


def stormy_request(random: Random, request_id: str, now: float, limit: int) -> Request:
    """A request for a world where one request may hold ``limit`` tokens; a few ask for one token more."""
    kind = random.choice([RequestKind.GENERATE] * 6 + [RequestKind.SCORE, RequestKind.EMBED])
    num_tokens = limit + 1 if random.random() < 0.05 else random.randint(2, limit)
    max_tokens = random.randint(1, min(num_tokens - 1, MAX_OUTPUT_TOKENS)) if kind is RequestKind.GENERATE else 0
    num_prompt_tokens = num_tokens - max_tokens
    if num_tokens <= limit and random.random() < 0.5:
        num_prompt_tokens = -(-num_prompt_tokens // 3)  # several fit at once, and grow until blocks are short
    num_own_tokens = random.randint(0, min(2, num_prompt_tokens))
    stem = random.choice(STEMS) * (1 + num_prompt_tokens // len(STEMS[0]))
    own = [random.randint(1, 2) for _ in range(num_own_tokens)]
    request = Request(
        id=RequestId(request_id),
        prompt=compact([*stem[: num_prompt_tokens - num_own_tokens], *own]),
        stop=StopRule(
            max_tokens=max_tokens,
            stop_token_ids=random.choice([frozenset(), frozenset({0})]),
            min_tokens=min(max_tokens, random.choice([0, 0, 3])),
        ),
        arrival_s=now,
        kind=kind,
        priority=random.randint(-2, 2),
        tenant=random.choice(TENANTS),
        cache_salt=random.choice(["", "", "", "x"]),
        deadline_s=now + random.choice([0.5, 1.0]) if random.random() < 0.3 else None,
        prompt_logprobs=random.random() < 0.15,
    )
    # Drawn last, so that the others are who they were before such requests were legal.
    warms = kind is RequestKind.GENERATE and random.random() < 0.05
    return replace(request, stop=StopRule(0)) if warms else request


def _add_some(world: World, random: Random, number: int) -> int:
    """One to four requests with equal prompts arrive, as the choices of one call do. Returns how many."""
    count = random.choice([1, 1, 2, 4])
    likeness = random.getrandbits(32)
    for index in range(count):
        limit = world.config.max_tokens_per_request
        world.add(stormy_request(Random(likeness), f"r{number + index}", world.clock(), limit))
    return count


def _disturb(world: World, random: Random) -> None:
    """Something goes wrong, or somebody leaves."""
    if not world.live:
        world.reset_prefix_cache()
        return
    somebody = random.choice(world.live)
    match random.randrange(5):
        case 0:
            world.finish(somebody, random.choice([FinishReason.CANCELLED, FinishReason.ERROR]))
        case 1:
            world.step({somebody: random.choice(list(Fault))})
        case 2:
            world.step(dict.fromkeys(world.live[:2], Fault.NOT_FINITE))
        case 3:
            world.step(finish_in_flight=[somebody, somebody])
        case _:
            world.step(crash_after=random.randint(0, 2))
