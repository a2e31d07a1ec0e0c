"""``SchedulerStats``: a frozen snapshot of what is going on, for metrics and for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Numbers at one moment."""

    num_running: int
    num_waiting: int
    """Not started yet, those set aside included."""
    num_set_aside: int
    """Of those, how many wait for an equal prefix to be computed."""
    num_preempted: int
    num_blocks: int
    """Usable blocks; the null block is not counted."""
    num_used_blocks: int
    num_pledged_blocks: int
    num_cached_blocks: int
    """Blocks in the prefix cache, held or not."""
    num_steps: int
    """Steps committed."""
    num_reserved_bytes: int = 0
    """What the accountant has set aside for the structures of live requests."""
