"""``World`` and the machine notice broken laws; here laws are broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler import FCFSPolicy, FinishReason, Policy, RequestId, RequestView, SchedulerConfig
from scheduler.events import Admitted, Event, Finished, Preempted, PrefixHit, PromptScored, Resumed, TokensCommitted
from scheduler.invariants import InvariantError
from scheduler.testing import SchedulerMachine, World, make_request, scheduler_machine, storm

NewWorld = Callable[..., World]
R = RequestId("r")


@pytest.mark.parametrize(
    ("law", "events"),
    [
        ("I17", [Admitted(R, 1, 0.0), Admitted(R, 1, 0.0)]),
        ("I17", [Resumed(R)]),
        ("I22", [Preempted(R, 1)] * 4),
        ("I11", [PrefixHit(R, 4, 4, first=True)]),
        ("I11", [PrefixHit(R, 9, 3, first=True)]),
        ("I27", [TokensCommitted(R, 1, 1, None)]),
        ("I27", [PromptScored(R, 2, ())]),
        ("I27", [Finished(R, FinishReason.CANCELLED, 0, 0), TokensCommitted(R, 0, 1, None)]),
        ("I27", [Finished(R, FinishReason.CANCELLED, 1, 0)]),
        ("I25", [TokensCommitted(R, 0, 77, None), Finished(R, FinishReason.LENGTH, 1, 0)]),
        ("I25", [Finished(R, FinishReason.LENGTH, 0, 0)]),
        ("I25", [Finished(R, FinishReason.STOP, 0, 0, embedding=5)]),
    ],
)
def test_a_history_that_cannot_be_is_refused_by_its_law(new_world: NewWorld, law: str, events: Sequence[Event]) -> None:
    world = new_world()
    world.add(make_request("r", [1]))
    with pytest.raises(InvariantError, match=f"^{law}: ") as caught:
        world.see(events)
    assert caught.value.law == law


def test_i23_overtakes_are_counted_per_request(new_world: NewWorld) -> None:
    world = new_world(max_overtakes=1)
    for name in ("r", "one", "two"):
        world.add(make_request(name, [1]))
    world.see([Admitted(RequestId("two"), 1, 0.0)])
    with pytest.raises(InvariantError, match="I23: 'r' was overtaken too often"):
        world.see([Admitted(RequestId("one"), 1, 0.0)])


class Lazy(FCFSPolicy):
    """A policy with a fault: it forgets those who come back."""

    def enqueue(self, request: RequestView) -> None:
        if request.serial != 2:
            super().enqueue(request)


class Moody(FCFSPolicy):
    """A policy that remembers earlier lives: no two plays are alike."""

    grants = 0

    def grant(self, request: RequestView, budget: int) -> int:  # noqa: ARG002 - anybody's
        Moody.grants += 1
        return 1 + Moody.grants % budget


def test_the_machine_is_named_after_the_policy_it_plays_with() -> None:
    machine = scheduler_machine(FCFSPolicy)
    assert machine.__name__ == "FCFSPolicyMachine"
    assert isinstance(machine.new_policy(), FCFSPolicy)
    with pytest.raises(NotImplementedError):
        SchedulerMachine.new_policy()


def test_a_machine_that_never_began_has_nothing_to_settle() -> None:
    scheduler_machine(FCFSPolicy)().teardown()


def test_i20_a_forgetful_policy_is_still_safe() -> None:
    for seed in range(10):
        storm(Lazy, seed, num_requests=30)


def test_i30_a_policy_that_differs_from_play_to_play_is_caught() -> None:
    with pytest.raises(InvariantError, match="I30: the same moves gave different events"):
        run_state_machine_as_test(
            scheduler_machine(Moody),
            settings=settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None),
        )


def test_a_storm_that_breaks_names_its_seed() -> None:
    class Broken(FCFSPolicy):
        def peek(self, now: float) -> RequestView | None:  # noqa: ARG002 - at no time
            raise InvariantError("I0", "made up")

    def new_policy() -> Policy:
        return Broken()

    with pytest.raises(InvariantError) as caught:
        storm(new_policy, 7, num_requests=5)
    assert caught.value.__notes__ == ["in storm(new_policy, 7, num_requests=5)"]


def test_a_refusal_is_counted_and_checked() -> None:
    world = World(SchedulerConfig(num_blocks=3, block_size=1, max_num_seqs=1, max_waiting=1), FCFSPolicy())
    assert not world.add(make_request("large", [1] * 9))
    assert world.add(make_request("r", [1], max_tokens=1))
    assert not world.add(make_request("queued", [1], max_tokens=1))
    assert world.reach.counts == {"refused: too large": 1, "refused: queue full": 1}
