"""``Census``: what each request waits for is what really held it up, and its place is its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduler import Blocking, Census, CensusEntry, FinishReason, PriorityPolicy, RequestId, RequestKind, RequestStatus
from scheduler.census import with_compiling
from scheduler.policies import Policy
from scheduler.request import RequestView
from scheduler.testing import StarvingPolicy, World, make_request

NewWorld = Callable[..., World]


def census(world: World, most: int = 100, tenant: str = "") -> Census:
    return world.scheduler.census(tenant, most)


def entry(world: World, request_id: str) -> CensusEntry:
    (found,) = [entry for entry in census(world).entries if entry.id == request_id]
    return found


def prompt(first: int, num_tokens: int = 5) -> list[int]:
    return [first] * num_tokens


def test_an_empty_scheduler_has_nobody_to_tell_of(new_world: NewWorld) -> None:
    assert census(new_world()) == Census("", (), 0, 0, 0)


def test_who_came_after_the_last_step_waits_for_the_next(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("a", prompt(1), max_tokens=7, priority=3, arrival_s=0.0))
    found = entry(world, "a")
    assert found == CensusEntry(
        id=RequestId("a"),
        status=RequestStatus.WAITING,
        kind=RequestKind.GENERATE,
        tenant="",
        priority=3,
        arrival_s=0.0,
        num_prompt_tokens=5,
        num_computed_tokens=0,
        num_output_tokens=0,
        max_tokens=7,
        num_preemptions=0,
        blocking=Blocking.NEXT_STEP,
        num_ahead=0,
        num_tokens_ahead=0,
    )


def test_who_runs_waits_for_nothing(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("a", prompt(1)))
    world.step()
    found = entry(world, "a")
    assert (found.status, found.blocking, found.num_ahead) == (RequestStatus.RUNNING, None, None)
    assert (found.num_computed_tokens, found.num_output_tokens) == (5, 1)


def test_without_a_free_seat_one_waits_for_a_seat(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=1)
    for number in (1, 2, 3):
        world.add(make_request(f"r{number}", prompt(number)))
    world.step()
    places = [(entry(world, name).blocking, entry(world, name).num_ahead) for name in ("r2", "r3")]
    assert places == [(Blocking.SEATS, 0), (Blocking.SEATS, 1)]
    assert entry(world, "r3").num_tokens_ahead == 1 + 5, "the next token of the one that runs, and the other's prompt"
    world.add(make_request("late", prompt(4)))
    assert entry(world, "late").blocking is Blocking.NEXT_STEP, "no step has looked at it yet"


def test_without_blocks_for_its_prompt_one_waits_for_blocks(new_world: NewWorld) -> None:
    world = new_world(num_blocks=6)
    world.add(make_request("large", prompt(1, 15)))
    world.add(make_request("next", prompt(2, 8)))
    world.step()
    assert entry(world, "next").blocking is Blocking.BLOCKS


def test_behind_a_long_prompt_one_waits_for_tokens(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=8)
    world.add(make_request("long", prompt(1, 20)))
    world.add(make_request("next", prompt(2)))
    world.step()
    found = entry(world, "next")
    assert (found.blocking, found.num_tokens_ahead) == (Blocking.TOKEN_BUDGET, 12)


def test_while_an_equal_prefix_is_computed_one_waits_for_it_and_has_no_place(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=8)
    world.add(make_request("first", prompt(1, 8)))
    world.add(make_request("twin", prompt(1, 8)))
    world.scheduler.step(0.0)  # while the first one's prompt is in the model
    assert entry(world, "twin").blocking is Blocking.TOKEN_BUDGET
    world = new_world(max_num_batched_tokens=16)
    world.add(make_request("first", prompt(1, 8)))
    world.add(make_request("twin", prompt(1, 8)))
    world.scheduler.step(0.0)
    found = entry(world, "twin")
    assert (found.blocking, found.num_ahead, found.num_tokens_ahead) == (Blocking.PREFIX, None, None)


def test_beyond_what_one_round_looks_at_one_waits_for_the_next_step(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=2, max_num_batched_tokens=64)
    world.add(make_request("first", prompt(1, 8)))
    for number in range(3):
        world.add(make_request(f"twin{number}", prompt(1, 8)))
    world.scheduler.step(0.0)
    reasons = [entry(world, f"twin{number}").blocking for number in range(3)]
    assert reasons == [Blocking.PREFIX, Blocking.PREFIX, Blocking.NEXT_STEP]


def test_who_was_handed_back_when_nobody_queued_waits_for_the_next_step(new_world: NewWorld) -> None:
    world = new_world(max_num_batched_tokens=16)
    world.add(make_request("first", prompt(1, 8)))
    world.add(make_request("twin", prompt(1, 8)))
    world.step()
    assert entry(world, "twin").blocking is Blocking.NEXT_STEP, "no policy holds it up"
    world.step()
    assert entry(world, "twin").status is RequestStatus.RUNNING


def test_the_preempted_wait_for_a_step_with_enough_blocks_and_go_first(new_world: NewWorld) -> None:
    world = new_world(num_blocks=6, enable_prefix_caching=False)
    world.add(make_request("old", prompt(1, 8), max_tokens=11))
    world.add(make_request("young", prompt(2, 7), max_tokens=11))
    while entry(world, "young").status is not RequestStatus.PREEMPTED:
        world.step()
        world.add(make_request("last", prompt(3)))
    young, last = entry(world, "young"), entry(world, "last")
    assert (young.blocking, young.num_ahead, young.num_preemptions) == (Blocking.PREEMPTION, 0, 1)
    assert last.num_ahead == 1
    counted = census(world)
    assert (counted.num_running, counted.num_waiting, counted.num_preempted) == (1, 1, 1)
    world.step()
    assert entry(world, "young").blocking is Blocking.BLOCKS


class _Closed(StarvingPolicy):
    """Admits nobody while somebody runs."""

    def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - at no time
        return None


@pytest.mark.parametrize(
    ("policy", "num_seats", "reason"),
    [(_Closed(), 2, Blocking.POLICY), (StarvingPolicy(), 1, Blocking.SEATS)],
    ids=["closed", "starving"],
)
def test_under_a_policy_without_an_order_nobody_has_a_place(
    new_world: NewWorld, policy: Policy, num_seats: int, reason: Blocking
) -> None:
    world = new_world(policy, max_num_seqs=num_seats)
    world.add(make_request("a", prompt(1)))
    world.step()
    world.add(make_request("b", prompt(2)))
    world.step()
    found = entry(world, "b")
    assert (found.blocking, found.num_ahead) == (reason, None)


def test_those_that_wait_are_told_in_the_order_in_which_they_go(new_world: NewWorld) -> None:
    world = new_world(PriorityPolicy(), max_num_seqs=1)
    for number, priority in enumerate([0, 5, -5, 1]):
        world.add(make_request(f"r{number}", prompt(number + 1), priority=priority))
    world.step()
    told = census(world).entries
    assert [entry.id for entry in told] == ["r2", "r0", "r3", "r1"]
    assert [entry.num_ahead for entry in told] == [None, 0, 1, 2]
    ended = []
    while world.scheduler.has_work:
        plan = world.scheduler.step(world.clock())
        events = world.scheduler.commit(world.runner.run(plan), world.clock())
        ended += [event.request_id for event in events if type(event).__name__ == "Finished"]
    assert ended == [entry.id for entry in told]


def test_a_tenant_sees_its_own_but_counts_those_ahead_of_it(new_world: NewWorld) -> None:
    world = new_world(max_num_seqs=1)
    for number, tenant in enumerate(["a", "b", "a", "b"]):
        world.add(make_request(f"r{number}", prompt(number + 1), tenant=tenant))
    world.step()
    told = census(world, tenant="b")
    assert [(entry.id, entry.num_ahead) for entry in told.entries] == [("r1", 0), ("r3", 2)]
    assert (told.tenant, told.num_running, told.num_waiting) == ("b", 0, 2)
    assert census(world, tenant="nobody").entries == ()


def test_a_census_is_bounded_but_counts_all(new_world: NewWorld) -> None:
    world = new_world()
    for number in range(20):
        world.add(make_request(f"r{number}", prompt(number + 1)))
    told = census(world, most=3)
    assert [entry.id for entry in told.entries] == ["r0", "r1", "r2"]
    assert told.num_waiting == 20
    assert census(world, most=0).num_waiting == 20


def test_taking_a_census_changes_nothing(new_world: NewWorld) -> None:
    """The same play with and without onlookers has the same events."""

    def play(*, watched: bool) -> list[object]:
        world = new_world(PriorityPolicy(), max_num_seqs=2, num_blocks=12)
        seen: list[object] = []
        for number in range(8):
            world.add(make_request(f"r{number}", prompt(number // 2 + 1, 9), priority=number % 3))
        for turn in range(60):
            if turn == 5:
                seen += world.scheduler.finish(RequestId("r6"), FinishReason.CANCELLED)
            plan = world.scheduler.step(float(turn))
            if watched:
                census(world)
            seen += [*plan.events, *world.scheduler.commit(world.runner.run(plan), float(turn))]
        return seen

    assert play(watched=True) == play(watched=False)


def test_requests_that_are_held_back_wait_for_their_grammars_behind_all_others(new_world: NewWorld) -> None:
    world = new_world()
    world.add(make_request("a", prompt(1)))
    held = [make_request("b", prompt(2), priority=4), make_request("c", prompt(3)), make_request("x", [1], tenant="x")]
    told = with_compiling(census(world), held, most=2)
    assert [(entry.id, entry.blocking) for entry in told.entries] == [
        ("a", Blocking.NEXT_STEP),
        ("b", Blocking.GRAMMAR),
    ]
    assert (told.entries[1].status, told.entries[1].priority) == (RequestStatus.WAITING, 4)
    assert told.num_waiting == 3
    assert with_compiling(census(world), held, most=1).entries == census(world).entries
