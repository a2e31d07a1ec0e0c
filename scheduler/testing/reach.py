"""What a play has shown: a law that was never in danger was not tested.

``Reach`` counts behaviours as a ``World`` moves. A test of a policy should ask afterwards whether the rare ones
occurred; ``scheduler.testing.machine`` reports them to Hypothesis as events, so that ``--hypothesis-show-statistics``
lists them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from scheduler.events import Admitted, BlockEvicted, Event, Finished, Preempted, PrefixHit, Resumed
from scheduler.lifecycle import FinishReason
from scheduler.plan import StepPlan
from scheduler.request import Request, RequestKind
from scheduler.scheduler import Scheduler

BEHAVIOURS: Final = (
    "preempted",
    "resumed",
    "resumed from the cache",
    "resumed with a pledge",
    "pledge held while others run",
    "preempted while decoding",
    "paused for want of blocks",
    "set aside",
    "set aside, then started from the cache",
    "started with a prefix hit",
    "started aged",
    "evicted",
    "chunked prompt",
    "shared block",
    "lost the race to publish",
    "poisoned while shared",
    "overdue while waiting",
    "overdue while running",
    "overdue while preempted",
    "embedding interrupted",
    "prompt scored in several steps",
    "prompt computed for the cache alone",
    "refused: too large",
    "refused: queue full",
    "refused: memory full",
)
"""Everything that ``Reach`` counts."""


class Reach:
    """Counts of behaviours. Looks at the scheduler's insides, as the laws do; changes nothing."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._were_set_aside: set[str] = set()

    def refused(self, reason: str) -> None:
        """A request was refused."""
        self._saw(f"refused: {reason}")

    def before_step(self, scheduler: Scheduler) -> None:
        """Look at a scheduler that is about to plan."""
        self._embedding = {s.id for s in scheduler._running.values() if s.embedding is not None}
        self._aged = {s.id for s in scheduler._room.waiting() if scheduler._room.is_aged(s)}
        self._where = {s.id: s.status.value for s in scheduler._states.values()}
        self._pending = {s.id: s.num_pending_tokens for s in scheduler._states.values()}

    def planned(self, scheduler: Scheduler, plan: StepPlan) -> None:
        """Look at a plan that was just made."""
        for event in plan.events:
            self._count_event(scheduler, event)
        stats = scheduler.stats()
        running = list(scheduler._running.values())
        scheduled = {s.request_id for s in plan.slices}
        self._saw("set aside", stats.num_set_aside)
        self._were_set_aside.update(scheduler._in_flight.awaited())
        self._saw("pledge held while others run", stats.num_pledged_blocks > 0 and stats.num_running > 1)
        idle = sum(state.id not in scheduled for state in running)
        self._saw("paused for want of blocks", idle and plan.num_tokens < scheduler.config.max_num_batched_tokens)
        for planned in plan.slices:
            state = scheduler._running[planned.request_id]
            self._saw("chunked prompt", planned.start + planned.num_tokens < state.num_prompt_tokens)
            self._saw("prompt scored in several steps", state.request.scores_prompt and planned.start > 0)
            self._saw("prompt computed for the cache alone", _only_warms(state.request))
        held = Counter(block_id for state in running for block_id in state.block_table)
        self._shared = {block_id for block_id, holders in held.items() if holders > 1}
        self._saw("shared block", bool(self._shared))
        self._tables = {state.id: set(state.block_table) for state in running}

    def committed(self, scheduler: Scheduler, events: Sequence[Event]) -> None:
        """Look at a scheduler that just took a result in."""
        for event in events:
            if isinstance(event, Finished) and event.reason is FinishReason.ERROR:
                self._saw("poisoned while shared", bool(self._tables.get(event.request_id, set()) & self._shared))
        self._saw("lost the race to publish", any(not state.publishing for state in scheduler._running.values()))

    def _count_event(self, scheduler: Scheduler, event: Event) -> None:
        match event:
            case Preempted(request_id=request_id):
                self._saw("preempted")
                self._saw("preempted while decoding", self._pending.get(request_id) == 1)
                self._saw("embedding interrupted", request_id in self._embedding)
            case Resumed(request_id=request_id):
                self._saw("resumed")
                self._saw("resumed with a pledge", request_id in scheduler._kv.pledges)
            case PrefixHit(request_id=request_id, num_hit_tokens=num_hit_tokens, first=first) if num_hit_tokens:
                self._saw("started with a prefix hit" if first else "resumed from the cache")
                self._saw("set aside, then started from the cache", request_id in self._were_set_aside)
            case Admitted(request_id=request_id):
                self._saw("started aged", request_id in self._aged)
            case BlockEvicted():
                self._saw("evicted")
            case Finished(request_id=request_id, reason=FinishReason.DEADLINE):
                self._saw(f"overdue while {self._where[request_id]}")
            case _:
                pass

    def _saw(self, behaviour: str, times: int | bool = True) -> None:
        assert behaviour in BEHAVIOURS, behaviour
        if times:
            self.counts[behaviour] += int(times)


def _only_warms(request: Request) -> bool:
    return request.kind is RequestKind.GENERATE and request.stop.max_tokens == 0 and not request.prompt_logprobs
