"""``invariants.check`` notices each broken law. The breaking is done to the scheduler's insides, by force: there is
no other way to reach a state that must not exist."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler import FCFSPolicy, RequestId, Scheduler, SchedulerConfig
from scheduler.invariants import CheckedScheduler, InvariantError, check, check_plan
from scheduler.lifecycle import RequestStatus
from scheduler.prefix_cache import CachedBlock
from scheduler.request import BlockId, RequestState
from scheduler.testing import KVHonestRunner, World, make_request

NewWorld = Callable[..., World]


@pytest.fixture
def scheduler(new_world: NewWorld) -> Scheduler:
    """Somebody decodes, somebody leads, somebody waits for the leader, somebody queues."""
    world = new_world(num_blocks=20, max_num_seqs=3, max_num_batched_tokens=12, max_prefill_chunk=8)
    world.add(make_request("decoding", [1] * 6, max_tokens=6))
    world.step()
    for name in ("leading", "following"):
        world.add(make_request(name, [2] * 20))
    world.add(make_request("third", [3] * 3))
    world.add(make_request("queued", [4] * 3))
    world.step()
    check(world.scheduler)
    return world.scheduler


def state_of(scheduler: Scheduler, name: str) -> RequestState:
    return scheduler._states[RequestId(name)]


def entry_of(scheduler: Scheduler, index: int) -> CachedBlock:
    return scheduler._kv.cache.entries()[index]


def duplicate_free(scheduler: Scheduler) -> None:
    scheduler._kv.pool._free[BlockId(0)] = None


def lose_a_block(scheduler: Scheduler) -> None:
    scheduler._kv.pool._free.popitem()


def hold_without_a_table(scheduler: Scheduler) -> None:
    scheduler._kv.pool.allocate(1)


def hold_twice(scheduler: Scheduler) -> None:
    table = state_of(scheduler, "decoding").block_table
    table.append(table[0])
    scheduler._kv.pool.retain(table[0])


def share_a_partial_block(scheduler: Scheduler) -> None:
    last = state_of(scheduler, "decoding").block_table[-1]
    scheduler._kv.pool.retain(last)
    state_of(scheduler, "leading").block_table.append(last)


def drop_a_block(scheduler: Scheduler) -> None:
    state = state_of(scheduler, "decoding")
    scheduler._kv.pool.release(state.block_table.pop(), reuse_soon=True)


def compute_the_unknown(scheduler: Scheduler) -> None:
    state = state_of(scheduler, "decoding")
    state.tokens = state.tokens[: state.num_computed_tokens - 1]


def ask_for_too_much(scheduler: Scheduler) -> None:
    state_of(scheduler, "queued").request = make_request("queued", [3] * 3, max_tokens=10_000)


def change_a_hash(scheduler: Scheduler) -> None:
    entry_of(scheduler, -1).block_hash = b"wrong"


def double_a_hash(scheduler: Scheduler) -> None:
    entry_of(scheduler, -1).block_hash = entry_of(scheduler, 0).block_hash


def orphan_a_block(scheduler: Scheduler) -> None:
    entry_of(scheduler, -1).parent = BlockId(19)


def change_the_tenant_of_a_block(scheduler: Scheduler) -> None:
    entry_of(scheduler, -1).root = b"another"


def give_a_block_of_another_tenant(scheduler: Scheduler) -> None:
    state = state_of(scheduler, "leading")
    state.request = make_request("leading", [2] * 20, tenant="another")


def change_the_tokens(scheduler: Scheduler) -> None:
    state_of(scheduler, "leading").tokens[0] = 7


def forget_what_was_computed(scheduler: Scheduler) -> None:
    state_of(scheduler, "leading").num_computed_tokens = 1


def list_the_finished(scheduler: Scheduler) -> None:
    state_of(scheduler, "queued").status = RequestStatus.FINISHED


def misplace(scheduler: Scheduler) -> None:
    state_of(scheduler, "queued").status = RequestStatus.PREEMPTED


def forget_a_live_request(scheduler: Scheduler) -> None:
    scheduler._room._waiting[RequestId("ghost")] = RequestState(make_request("ghost", [1]), 99)


def miscount_the_preempted(scheduler: Scheduler) -> None:
    scheduler._room._num_preempted = 1


def seat_too_many(scheduler: Scheduler) -> None:
    scheduler.config = SchedulerConfig(
        num_blocks=20, block_size=4, max_num_seqs=1, max_num_batched_tokens=12, max_prefill_chunk=8
    )


def preempt_too_often(scheduler: Scheduler) -> None:
    state_of(scheduler, "queued").num_preemptions = 4


def miscount_pledges(scheduler: Scheduler) -> None:
    scheduler._kv._num_pledged = 1


def pledge_what_is_not_free(scheduler: Scheduler) -> None:
    scheduler._kv._num_pledged = 100
    scheduler._kv._pledges[RequestId("decoding")] = 100


def pledge_to_a_stranger(scheduler: Scheduler) -> None:
    scheduler._kv.pledge(state_of(scheduler, "queued"), 1)


def pledge_too_little(scheduler: Scheduler) -> None:
    scheduler._kv.pledge(state_of(scheduler, "leading"), 1)


def lead_without_running(scheduler: Scheduler) -> None:
    block_hash = scheduler._in_flight._awaits[RequestId("following")]
    scheduler._in_flight._leader_of[block_hash] = RequestId("queued")


def lead_without_publishing(scheduler: Scheduler) -> None:
    state_of(scheduler, "leading").publishing = False


def set_aside_the_dead(scheduler: Scheduler) -> None:
    scheduler._in_flight._awaits[RequestId("ghost")] = scheduler._in_flight._awaits[RequestId("following")]


@pytest.mark.parametrize(
    ("law", "break_it"),
    [
        ("I1", duplicate_free),
        ("I1", lose_a_block),
        ("I2", hold_without_a_table),
        ("I3", hold_twice),
        ("I5", share_a_partial_block),
        ("I6", drop_a_block),
        ("I18", compute_the_unknown),
        ("I19", ask_for_too_much),
        ("I9", change_a_hash),
        ("I9", double_a_hash),
        ("I11", orphan_a_block),
        ("I12", change_the_tenant_of_a_block),
        ("I12", give_a_block_of_another_tenant),
        ("I9", change_the_tokens),
        ("I5|I10", forget_what_was_computed),
        ("I17", list_the_finished),
        ("I17", misplace),
        ("I17", forget_a_live_request),
        ("I17", miscount_the_preempted),
        ("I16", seat_too_many),
        ("I22", preempt_too_often),
        ("I8", miscount_pledges),
        ("I8", pledge_what_is_not_free),
        ("I8", pledge_to_a_stranger),
        ("I22", pledge_too_little),
        ("I20", lead_without_running),
        ("I20", lead_without_publishing),
        ("I17", set_aside_the_dead),
    ],
)
def test_each_broken_law_is_noticed_by_its_id(
    scheduler: Scheduler, law: str, break_it: Callable[[Scheduler], None]
) -> None:
    break_it(scheduler)
    with pytest.raises(InvariantError, match=f"^({law}): "):
        check(scheduler)


def test_i29_what_outlives_the_last_request_is_noticed(new_world: NewWorld) -> None:
    world = new_world()
    world.scheduler._in_flight.lead(RequestId("ghost"), [b"h"])
    with pytest.raises(InvariantError, match=r"^I29: "):
        check(world.scheduler)


def test_the_laws_of_a_plan_are_noticed_by_their_ids(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2, max_num_batched_tokens=8)
    world.add(make_request("a", [1] * 3))
    world.add(make_request("b", [2] * 3))
    plan = world.scheduler.step(0.0)
    check_plan(world.scheduler, plan)
    a, b = plan.slices
    broken = {
        "I16": [a._replace(num_tokens=50), a._replace(num_tokens=0)],
        "I17": [a._replace(request_id=RequestId("stranger"))],
        "I4": [a._replace(block_table=b.block_table), a._replace(block_table=[BlockId(9)])],
        "I6": [a._replace(block_table=[*a.block_table, BlockId(9)])],
    }
    for law, slices in broken.items():
        for scheduled in slices:
            with pytest.raises(InvariantError, match=f"^{law}: "):
                check_plan(world.scheduler, type(plan)(0, (scheduled, b), ()))
    with pytest.raises(InvariantError, match=r"^I16: a request has two slices"):
        check_plan(world.scheduler, type(plan)(0, (a, a), ()))


def test_i4_writing_a_findable_block_is_noticed(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("a", [1] * 9))
    world.step()
    plan = world.scheduler.step(0.0)
    (scheduled,) = plan.slices
    rewriting = type(plan)(0, (scheduled._replace(start=0),), ())
    with pytest.raises(InvariantError, match=r"^I4: block 1 is written but findable"):
        check_plan(world.scheduler, rewriting)


def test_a_checked_scheduler_checks_itself_at_every_step() -> None:
    config = SchedulerConfig(num_blocks=20, block_size=4, max_num_seqs=2)
    scheduler, runner = CheckedScheduler(config, FCFSPolicy()), KVHonestRunner(20, 4)
    scheduler.add(make_request("r", [1] * 6), 0.0)
    plan = scheduler.step(0.0)
    scheduler.commit(runner.run(plan), 0.0)
    scheduler._kv.pool.allocate(1)
    with pytest.raises(InvariantError, match=r"^I2: "):
        scheduler.step(0.0)
