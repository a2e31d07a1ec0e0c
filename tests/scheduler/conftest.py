"""A small world to play in by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scheduler.config import SchedulerConfig
from scheduler.policies import FCFSPolicy, Policy
from scheduler.testing import World

NewWorld = Callable[..., World]


@pytest.fixture
def new_world() -> NewWorld:
    """Makes worlds: roomy unless told otherwise, first come first served."""

    def make(policy: Policy | None = None, *, budget_bytes: int = 10**9, **fields: Any) -> World:
        config = SchedulerConfig(**{"num_blocks": 100, "block_size": 4, "max_num_seqs": 8, **fields})
        return World(config, policy or FCFSPolicy(), budget_bytes=budget_bytes)

    return make
