"""``Request`` refuses nonsense by the field's name; ``RequestState`` is two numbers."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from scheduler.errors import InvalidRequestError
from scheduler.request import Request, RequestId, RequestKind, RequestState, StopRule
from scheduler.testing import compact, make_request


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [1, -1]}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"kind": RequestKind.SCORE, "max_tokens": 1}),
        ("max_tokens", {"kind": RequestKind.EMBED, "max_tokens": 1}),
        ("max_tokens", {"kind": RequestKind.EMBED, "max_tokens": -1}),
        ("min_tokens", {"max_tokens": 2, "min_tokens": 3}),
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"max_tokens": 0, "min_tokens": 1}),
        ("deadline_s", {"deadline_s": float("nan")}),
        ("arrival_s", {"arrival_s": float("nan")}),
        ("extra_bytes", {"extra_bytes": -1}),
    ],
)
def test_nonsense_is_refused_by_the_name_of_its_field(field: str, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        make_request("r", **{"prompt": [1], **changes})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_edges_are_accepted() -> None:
    make_request("r", [0], max_tokens=1, min_tokens=1)
    make_request("r", [1], max_tokens=0)
    make_request("r", [1], max_tokens=0, kind=RequestKind.SCORE)
    make_request("r", [1], max_tokens=0, kind=RequestKind.EMBED)


def test_without_further_wishes_nothing_is_restricted() -> None:
    assert StopRule(3) == StopRule(max_tokens=3, stop_token_ids=frozenset(), min_tokens=0)
    request = Request(RequestId("r"), compact([1]), StopRule(3), 0.0)
    assert (request.kind, request.priority, request.tenant, request.cache_salt) == (RequestKind.GENERATE, 0, "", "")
    assert (request.deadline_s, request.prompt_logprobs) == (None, False)


def test_a_request_is_frozen() -> None:
    request = make_request("r", [1])
    with pytest.raises(FrozenInstanceError):
        request.priority = 3  # type: ignore[misc]


def test_scoring_is_implied_by_the_kind_or_asked_for() -> None:
    assert make_request("r", [1], max_tokens=0, kind=RequestKind.SCORE).scores_prompt
    assert make_request("r", [1], prompt_logprobs=True).scores_prompt
    assert not make_request("r", [1]).scores_prompt
    assert not make_request("r", [1], max_tokens=0, kind=RequestKind.EMBED).scores_prompt


def test_the_most_it_can_hold_is_prompt_and_output() -> None:
    assert make_request("r", [1, 2, 3], max_tokens=5).max_total_tokens == 8


def test_a_state_counts_known_computed_and_pending_tokens() -> None:
    state = RequestState(make_request("r", [1, 2, 3], priority=4, tenant="acme", deadline_s=9.0, arrival_s=2.0), 7)
    assert (state.num_prompt_tokens, state.num_tokens) == (3, 3)
    assert (state.num_output_tokens, state.num_pending_tokens) == (0, 3)
    state.tokens.append(5)
    state.num_computed_tokens = 3
    assert (state.num_prompt_tokens, state.num_tokens) == (3, 4)
    assert (state.num_output_tokens, state.num_pending_tokens) == (1, 1)
    assert list(state.request.prompt) == [1, 2, 3], "the caller's prompt is not touched"
    assert (state.priority, state.tenant, state.deadline_s, state.arrival_s) == (4, "acme", 9.0, 2.0)
    assert (state.id, state.kind, state.serial) == ("r", RequestKind.GENERATE, 7)
