"""Policies that come with the library, by the name that settings use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from scheduler.policies.base import Policy
from scheduler.policies.fcfs import FCFSPolicy
from scheduler.policies.ordered import OrderedPolicy
from scheduler.policies.priority import PriorityPolicy

POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    "fcfs": FCFSPolicy,
    "priority": PriorityPolicy,
}

__all__ = ["POLICIES", "FCFSPolicy", "OrderedPolicy", "Policy", "PriorityPolicy"]
