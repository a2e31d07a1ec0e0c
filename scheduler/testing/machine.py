"""``SchedulerMachine``: Hypothesis plays with a scheduler, any policy's, and every law is checked after each move.

To test a policy of your own::

    from scheduler.testing import scheduler_machine
    TestMyPolicy = scheduler_machine(MyPolicy).TestCase

The moves are those of real life: requests come, steps succeed, fail in every known way, are cancelled at
every moment, time passes or stands still. At the end of each play the world must settle: everybody ends, nothing is
left, and playing the same moves again gives the same events (I30).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, precondition, rule

from scheduler.config import SchedulerConfig
from scheduler.events import Event
from scheduler.invariants import InvariantError
from scheduler.lifecycle import FinishReason
from scheduler.policies.base import Policy
from scheduler.prefix_cache import HashFunction
from scheduler.request import RequestId
from scheduler.testing.fake_runner import Fault
from scheduler.testing.strategies import configs, hash_functions, requests
from scheduler.testing.world import World

Move = Callable[[World], object]


class SchedulerMachine(RuleBasedStateMachine):
    """The play. Subclass with ``new_policy``, or call ``scheduler_machine``."""

    @staticmethod
    def new_policy() -> Policy:
        """A fresh policy for a fresh world."""
        raise NotImplementedError

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self.num_added = 0

    @initialize(config=configs(), hash_function=hash_functions(), budget_bytes=st.sampled_from([10**9, 60_000]))
    def begin(self, config: SchedulerConfig, hash_function: HashFunction, budget_bytes: int) -> None:
        self.setup = (config, hash_function, budget_bytes)
        self.world = self.new_world()

    def new_world(self) -> World:
        """A fresh world of the same setup."""
        config, hash_function, budget_bytes = self.setup
        return World(config, self.new_policy(), hash_function=hash_function, budget_bytes=budget_bytes)

    def play(self, move: Move) -> object:
        """Make a move and remember it for the replay."""
        self.moves.append(move)
        return move(self.world)

    @rule(target=ids, data=st.data(), count=st.integers(1, 4))
    def add(self, data: st.DataObject, count: int) -> object:
        """Some requests arrive; equal prompts are frequent, as the choices of one call are."""
        limit = self.world.config.max_tokens_per_request
        first = data.draw(requests(f"r{self.num_added}", self.world.clock(), limit))
        added: list[RequestId] = []
        for _ in range(count):
            request = replace(first, id=RequestId(f"r{self.num_added}"))
            self.num_added += 1
            if self.play(partial(World.add, request=request)):
                added.append(request.id)
        return multiple(*added)

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(count=st.integers(1, 8), step_s=st.sampled_from([0.0, 0.0, 0.3]))
    def step(self, count: int, step_s: float) -> None:
        for _ in range(count):
            self.play(lambda world: world.step())
            self.play(lambda world: world.clock.advance(step_s))

    @rule(request_id=ids, fault=st.sampled_from(Fault))
    def step_with_fault(self, request_id: RequestId, fault: Fault) -> None:
        self.play(lambda world: world.step({request_id: fault}))

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(crash_after=st.integers(0, 2), request_id=ids)
    def step_that_is_disturbed(self, crash_after: int, request_id: RequestId) -> None:
        """The runner raises half-way, or (more often) somebody is cancelled between run and commit, twice."""
        if crash_after == 0:
            self.play(lambda world: world.step(crash_after=1))
        else:
            self.play(lambda world: world.step(finish_in_flight=[request_id, request_id]))

    @rule(request_id=ids, reason=st.sampled_from([FinishReason.CANCELLED, FinishReason.ERROR]))
    def finish(self, request_id: RequestId, reason: FinishReason) -> None:
        """Somebody is ended from outside, wherever it is; it may have ended long ago."""
        self.play(lambda world: world.finish(request_id, reason))

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.play(lambda world: world.clock.advance(seconds))

    @rule()
    def reset_prefix_cache(self) -> None:
        """All of it, or while somebody runs what nobody holds."""
        self.play(lambda world: world.reset_prefix_cache() or world.drop_unheld_prefixes())

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.settle()
        for behaviour in self.world.reach.counts:
            event(behaviour)
        again = self.replay()
        if again != self.world.trace:
            raise InvariantError("I30", "the same moves gave different events")

    def replay(self) -> list[Event]:
        """Play the same moves in a fresh world; returns its events."""
        world = self.new_world()
        for move in self.moves:
            move(world)
        world.settle()
        return world.trace


def scheduler_machine(new_policy: Callable[[], Policy]) -> type[SchedulerMachine]:
    """A state machine that plays with schedulers under ``new_policy()``."""
    return type(f"{new_policy.__name__}Machine", (SchedulerMachine,), {"new_policy": staticmethod(new_policy)})
