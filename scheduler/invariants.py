"""The written laws that one look at a scheduler can check. ``docs/laws.md`` states them all, by the same ids.

``check`` walks over everything, so it costs time proportional to all that lives; tests and the simulator call
it after every move, the server only under a debug flag. It reads the scheduler's insides, which is its
privilege: the laws are about them.

A law that needs two moments (progress, termination, transparency) is checked by ``scheduler.testing``.
"""

from __future__ import annotations

from array import array
from collections import Counter

from scheduler.block_pool import NULL_BLOCK
from scheduler.events import Event
from scheduler.lifecycle import RequestStatus
from scheduler.plan import StepPlan, StepResult
from scheduler.request import TOKEN_TYPECODE, BlockId, RequestState
from scheduler.scheduler import Scheduler


class InvariantError(AssertionError):
    """A law does not hold. ``law`` is its id."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law


def check(scheduler: Scheduler) -> None:
    """Check every state law.

    Raises:
        InvariantError: the first law that does not hold.
    """
    _check_pool(scheduler)
    _check_tables(scheduler)
    _check_prefix_cache(scheduler)
    _check_membership(scheduler)
    _check_pledges(scheduler)
    _check_set_aside(scheduler)
    if not scheduler.has_work:
        _check_quiescence(scheduler)


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    """Check the laws of a plan that ``step`` just returned.

    Raises:
        InvariantError: the first law that does not hold.
    """
    config = scheduler.config
    size = config.block_size
    _require("I16", plan.num_tokens <= config.max_num_batched_tokens, "the step exceeds its token budget")
    _require("I16", all(s.num_tokens >= 1 for s in plan.slices), "an empty slice was scheduled")
    _require("I16", len({s.request_id for s in plan.slices}) == len(plan.slices), "a request has two slices")
    written: set[tuple[int, int]] = set()
    for scheduled in plan.slices:
        state = scheduler._running.get(scheduled.request_id)
        _require("I17", state is not None, f"{scheduled.request_id!r} is scheduled but does not run")
        for position in range(scheduled.start, scheduled.start + scheduled.num_tokens):
            block_id = scheduled.block_table[position // size]
            slot = (block_id, position % size)
            _require("I4", slot not in written, f"slot {slot} is written twice in one step")
            written.add(slot)
            _require("I4", scheduler._kv.pool.ref_count(block_id) == 1, f"block {block_id} is written but shared")
            _require("I4", block_id not in scheduler._kv.cache, f"block {block_id} is written but findable")
        most = -(-(scheduled.start + scheduled.num_tokens) // size)
        _require("I6", len(scheduled.block_table) <= most, f"{scheduled.request_id!r} holds more than the step needs")


class CheckedScheduler(Scheduler):
    """A scheduler that checks itself after every step: the server's debug flag. Slow by design."""

    def step(self, now: float) -> StepPlan:
        plan = super().step(now)
        check(self)
        check_plan(self, plan)
        return plan

    def commit(self, result: StepResult, now: float) -> tuple[Event, ...]:
        events = super().commit(result, now)
        check(self)
        return events


def _require(law: str, holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(law, message)


def _live(scheduler: Scheduler) -> list[RequestState]:
    return list(scheduler._states.values())


def _blocks(scheduler: Scheduler) -> map[BlockId]:
    return map(BlockId, range(1, scheduler.config.num_blocks))


def _check_pool(scheduler: Scheduler) -> None:
    pool = scheduler._kv.pool
    free = pool.free_blocks()
    _require("I1", len(free) == len(set(free)), "the free list has duplicates")
    _require("I1", NULL_BLOCK not in free, "the null block is free")
    _require("I1", pool.ref_count(NULL_BLOCK) == 0, "the null block has a holder")
    unheld = {block_id for block_id in _blocks(scheduler) if pool.ref_count(block_id) == 0}
    _require("I1", set(free) == unheld, "the free list and the holders disagree")
    _require("I1", len(free) + pool.num_used + 1 == pool.num_blocks, "blocks are lost or doubled")


def _check_tables(scheduler: Scheduler) -> None:
    pool, size = scheduler._kv.pool, scheduler.config.block_size
    holders = Counter(block_id for state in _live(scheduler) for block_id in state.block_table)
    for block_id in _blocks(scheduler):
        held, counted = holders[block_id], pool.ref_count(block_id)
        _require("I2", held == counted, f"block {block_id} is in {held} tables but counts {counted} holders")
    for state in _live(scheduler):
        table = state.block_table
        _require("I3", len(table) == len(set(table)), f"{state.id!r} holds a block twice")
        _require("I3", all(0 < b < pool.num_blocks for b in table), f"{state.id!r} holds a block outside the pool")
        num_full = state.num_computed_tokens // size
        _require(
            "I5",
            all(pool.ref_count(block_id) == 1 for block_id in table[num_full:]),
            f"{state.id!r} shares a block that is not full",
        )
        least = -(-state.num_computed_tokens // size)
        _require("I6", len(table) >= least, f"{state.id!r} computed tokens that have no block")
        _require("I18", 0 <= state.num_computed_tokens <= state.num_tokens, f"{state.id!r} computed unknown tokens")
        _require(
            "I19",
            state.request.max_total_tokens <= scheduler.config.max_tokens_per_request,
            f"{state.id!r} could never fit",
        )


def _check_prefix_cache(scheduler: Scheduler) -> None:
    cache, size = scheduler._kv.cache, scheduler.config.block_size
    entries = {entry.block_id: entry for entry in cache.entries()}
    _require("I9", len({entry.block_hash for entry in entries.values()}) == len(entries), "a hash names two blocks")
    for entry in entries.values():
        parent = entries.get(entry.parent) if entry.parent is not None else None
        _require("I11", entry.parent is None or parent is not None, f"block {entry.block_id} lost its parent")
        before = parent.block_hash if parent is not None else entry.root
        chained = cache.chain(before, array(TOKEN_TYPECODE, entry.tokens))
        _require("I9", chained == entry.block_hash, f"block {entry.block_id} has a wrong hash")
        _require("I12", parent is None or parent.root == entry.root, f"block {entry.block_id} changed its tenant")
    for state in _live(scheduler):
        root = cache.root(state.tenant, state.request.cache_salt)
        for index, block_id in enumerate(state.block_table):
            cached = entries.get(block_id)
            if cached is not None:
                own = state.tokens[index * size : (index + 1) * size].tobytes()
                _require("I12", cached.root == root, f"{state.id!r} holds a block of another tenant")
                _require("I9", cached.tokens == own, f"{state.id!r} holds a block of other tokens")
                written = (index + 1) * size <= state.num_computed_tokens
                _require("I10", written, f"block {block_id} is findable before it was written")


def _check_membership(scheduler: Scheduler) -> None:
    room = scheduler._room
    places = {
        RequestStatus.RUNNING: set(scheduler._running),
        RequestStatus.WAITING: {state.id for state in room.waiting()},
        RequestStatus.PREEMPTED: {state.id for state in room.preempted()},
    }
    for state in _live(scheduler):
        _require("I17", state.status is not RequestStatus.FINISHED, f"{state.id!r} is over but listed")
        for status, ids in places.items():
            _require("I17", (state.id in ids) == (state.status is status), f"{state.id!r} is not where its status says")
    listed = sum(len(ids) for ids in places.values())
    _require("I17", listed == len(scheduler._states), "somebody waits or runs who is not live")
    _require("I17", room.num_preempted == len(places[RequestStatus.PREEMPTED]), "preempted requests are miscounted")
    _require("I16", len(scheduler._running) <= scheduler.config.max_num_seqs, "more requests run than there are seats")
    worst = max((state.num_preemptions for state in _live(scheduler)), default=0)
    _require("I22", worst <= scheduler.config.max_preemptions, "a request was preempted too often")


def _check_pledges(scheduler: Scheduler) -> None:
    kv = scheduler._kv
    pledges = kv.pledges
    _require("I8", sum(pledges.values()) == kv.pool.num_free - kv.num_available, "pledges are miscounted")
    _require("I8", kv.num_available >= 0, "more blocks are pledged than free")
    _require("I8", set(pledges) <= set(scheduler._running), "somebody who does not run holds a pledge")
    for request_id, pledged in pledges.items():
        state = scheduler._states[request_id]
        whole = kv.num_blocks_for(state.request.max_total_tokens)
        _require("I22", pledged + len(state.block_table) == whole, f"{request_id!r} is pledged too little")


def _check_set_aside(scheduler: Scheduler) -> None:
    in_flight = scheduler._in_flight
    for request_id, block_hash in in_flight.awaited().items():
        leader = in_flight.leader_of(block_hash)
        _require("I20", leader in scheduler._running, f"{request_id!r} waits for a block that nobody computes")
        publishing = any(state.publishing for state in scheduler._running.values() if state.id == leader)
        _require("I20", publishing, f"{request_id!r} waits for a block that nobody will publish")
        _require("I17", request_id in scheduler._states, f"{request_id!r} is over but set aside")


def _check_quiescence(scheduler: Scheduler) -> None:
    pool = scheduler._kv.pool
    _require("I29", pool.num_free == pool.num_blocks - 1, "blocks are held though nobody lives")
    _require("I29", not scheduler._kv.pledges, "a pledge outlived its request")
    _require("I29", not scheduler._in_flight.leads_any, "a prefix is in flight though nobody lives")
