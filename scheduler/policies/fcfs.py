"""``FCFSPolicy``: first come, first served. The latest arrival is the first victim.

The default. Simple, starvation-free without any help, and the yardstick for every other policy.
"""

from __future__ import annotations

from scheduler.policies.ordered import Key, OrderedPolicy
from scheduler.request import RequestView


class FCFSPolicy(OrderedPolicy):
    """Order of arrival."""

    def key(self, request: RequestView) -> Key:
        return (request.serial,)
