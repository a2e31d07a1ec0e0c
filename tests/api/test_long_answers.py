"""Answers of many tokens with all their alternatives: what it takes to spell them."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mixtral_serve.api.completion_format import CompletionFormat
from mixtral_serve.api.convert import Choice
from mixtral_serve.api.formats import AnswerFormat, AnswerHead, ChatFormat, Extras
from mixtral_serve.api.logprobs import TokenNames
from mixtral_serve.api.response_format import ResponseFacts, ResponseWriter
from mixtral_serve.api.responses import JsonResponse
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.events import TokenLogprob

NUM_TOKENS = 1_000
NUM_ALTERNATIVES = 20
TABLE = TokenBytes({token_id: b" word%d" % token_id for token_id in range(NUM_TOKENS)})
HEAD = AnswerHead("answer", 0, "model", "fingerprint")
PROMPT = array("i", range(NUM_TOKENS + 1))


def entry(position: int) -> TokenLogprob:
    """All its numbers have as many digits as a logarithm has."""
    top = tuple(((position + k) % NUM_TOKENS, -(k + 1) / 3) for k in range(NUM_ALTERNATIVES))
    return TokenLogprob(position, -1 / 3, top)


def chat() -> AnswerFormat:
    return ChatFormat(HEAD, TABLE, Extras(prompts=(PROMPT,)))


def completion() -> AnswerFormat:
    extras = Extras(prompts=(PROMPT,))
    return CompletionFormat(HEAD, TABLE, extras, logprobs=NUM_ALTERNATIVES, echoes=None, skip_special_tokens=True)


def scored_prompt() -> AnswerFormat:
    return ChatFormat(HEAD, TABLE, Extras(prompts=(PROMPT,), prompt_logprobs=NUM_ALTERNATIVES))


def growth_bytes(work: Callable[[], object]) -> int:
    """By how much memory rises, at its highest, while ``work`` is done."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("new_format", [chat, completion, scored_prompt])
def test_spelling_an_answer_takes_no_more_than_a_few_times_its_length(new_format: Callable[[], AnswerFormat]) -> None:
    entries = [entry(position) for position in range(NUM_TOKENS)]
    choice = Choice(finish_reason="length")
    (choice.prompt_logprobs if new_format is scored_prompt else choice.logprobs).extend(entries)
    format_ = new_format()
    bodies: list[bytes] = []

    def spell() -> None:
        bodies.append(bytes(JsonResponse(format_.answer([choice], {})).body))

    assert growth_bytes(spell) < 3.5 * len(bodies[0])
    assert bodies[0].count(b"word") >= NUM_TOKENS * NUM_ALTERNATIVES


def test_a_response_holds_no_more_than_a_few_times_what_it_will_say() -> None:
    facts = ResponseFacts("response", 0, {}, 1, has_logprobs=True, offers_tools=False, may_be_text=True)
    writer = ResponseWriter(facts, TokenNames(TABLE))
    deltas = [
        Delta(request_id="1", text=" word", token_ids=(i,), logprobs=(entry(i),), finish_reason=None)
        for i in range(NUM_TOKENS)
    ]

    def tell() -> None:
        for delta in deltas:
            writer.push(delta, now=0)

    held_bytes = growth_bytes(tell)
    writer.push(Delta(request_id="1", finish_reason="length"), now=0)
    body: Any = JsonResponse(writer.response(now=0)).body
    assert held_bytes < 1.5 * len(body)
    (item,) = msgspec.json.decode(body)["output"]
    (part,) = item["content"]
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [NUM_ALTERNATIVES] * NUM_TOKENS
