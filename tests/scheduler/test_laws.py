"""The laws I1 to I32, played out against the policies that come with the library and against hostile ones.

``LAW_EXAMPLES`` sets how long: the mutation run shortens it, a nightly run may stretch it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler.policies import POLICIES, Policy
from scheduler.testing import BEHAVIOURS, ErraticPolicy, StarvingPolicy, scheduler_machine, storm

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "100"))
EVERY_POLICY = [*POLICIES.values(), StarvingPolicy, ErraticPolicy]


def test_i1_to_i32_hold_in_storms_that_reach_every_behaviour_the_laws_are_about() -> None:
    reached: Counter[str] = Counter()
    for seed in range(max(1, EXAMPLES // 6)):
        for new_policy in EVERY_POLICY:
            reached.update(storm(new_policy, seed).reach.counts)
    if EXAMPLES >= 100:
        assert not {behaviour: reached[behaviour] for behaviour in BEHAVIOURS if reached[behaviour] < 3}


@pytest.mark.parametrize("new_policy", EVERY_POLICY, ids=lambda policy: policy.__name__)
def test_i1_to_i32_hold_in_hypothesis_plays_under_every_policy(new_policy: Callable[[], Policy]) -> None:
    reached: Counter[str] = Counter()

    class CountingMachine(scheduler_machine(new_policy)):  # type: ignore[misc]
        def teardown(self) -> None:
            super().teardown()
            if hasattr(self, "world"):
                reached.update(self.world.reach.counts)

    run_state_machine_as_test(
        CountingMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=60,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=list(Phase) if EXAMPLES >= 100 else [Phase.generate],  # a mutant is dead without being shrunk
        ),
    )
    if EXAMPLES >= 100:
        common = ("preempted", "set aside", "started with a prefix hit", "evicted", "chunked prompt", "started aged")
        assert not {behaviour: reached[behaviour] for behaviour in common if reached[behaviour] < 3}
