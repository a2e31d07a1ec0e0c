"""``make_request``: a request in one line, for hand-written tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scheduler.request import Request, RequestId, StopRule
from scheduler.testing.world import compact


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 4,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    **fields: Any,
) -> Request:
    """A request that arrived at time 0; ``fields`` are those of ``Request``."""
    stop = StopRule(max_tokens=max_tokens, stop_token_ids=frozenset(stop_token_ids), min_tokens=min_tokens)
    return Request(id=RequestId(request_id), prompt=compact(prompt), stop=stop, **{"arrival_s": 0.0, **fields})
