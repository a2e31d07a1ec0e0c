"""The laws I1 to I32, played out by Hypothesis against each policy that comes with the library."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from scheduler.policies import POLICIES
from scheduler.testing import scheduler_machine


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_law_holds_under_every_policy(name: str) -> None:
    run_state_machine_as_test(
        scheduler_machine(POLICIES[name]),
        settings=settings(
            max_examples=300,
            stateful_step_count=80,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
