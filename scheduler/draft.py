"""``StepDraft``: a plan while it is being made.

Owns the token budget of one step: what is scheduled so far, and giving a share back when its request turns
out to be a victim. ``budget`` plus the scheduled tokens is constant.
"""

from __future__ import annotations

from scheduler.events import Event
from scheduler.plan import ScheduledSlice, StepPlan
from scheduler.request import RequestId, RequestKind, RequestState


class StepDraft:
    """Slices, remaining token budget and events of the step being planned."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.events: list[Event] = []
        self._slices: dict[RequestId, ScheduledSlice] = {}

    def __len__(self) -> int:
        return len(self._slices)

    def schedule(self, state: RequestState, num_tokens: int) -> None:
        """Compute the next ``num_tokens`` tokens of ``state``; its table covers them already."""
        start = state.num_computed_tokens
        num_known = len(state.tokens)
        request = state.request
        samples = request.stop.max_tokens > 0 and start + num_tokens == num_known
        scores = start < len(request.prompt) and request.scores_prompt
        self._slices[request.id] = ScheduledSlice(
            request.id,
            start,
            num_tokens,
            state.tokens,
            state.block_table,
            num_tokens if scores else int(samples),
            samples,
            num_known - len(request.prompt),
            request.kind is RequestKind.EMBED,
            state.embedding,
        )
        self.budget -= num_tokens

    def withdraw(self, state: RequestState) -> None:
        """Its share, if it had one, goes back to the budget."""
        withdrawn = self._slices.pop(state.id, None)
        if withdrawn is not None:
            self.budget += withdrawn.num_tokens

    def plan(self, step_id: int) -> StepPlan:
        """The finished plan."""
        return StepPlan(step_id, tuple(self._slices.values()), tuple(self.events))
