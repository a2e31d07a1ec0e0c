"""``PriorityPolicy``: lower ``priority`` first, order of arrival among equals.

The least urgent (largest priority, then latest) running request is the first victim. Priority decides who is
admitted and who gives way when blocks run out; it does not evict anybody just to take a seat. That a stream
of urgent requests cannot starve the others is the scheduler's ageing bound, not this file's business.
"""

from __future__ import annotations

from scheduler.policies.ordered import Key, OrderedPolicy
from scheduler.request import RequestView


class PriorityPolicy(OrderedPolicy):
    """Order of (priority, arrival)."""

    def key(self, request: RequestView) -> Key:
        return (request.priority, request.serial)
