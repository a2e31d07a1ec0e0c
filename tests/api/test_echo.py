"""Prompts told again: ``echo``, scored prompts, ids, and prompts that are cut."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest

from mixtral_serve.api.convert import MAX_SCORES
from mixtral_serve.engine.admission import decode_prompt
from mixtral_serve.engine.messages import Delta
from scheduler.events import TokenLogprob

HELLO, WORLD = 269, 274


def test_an_echo_comes_before_the_answer_and_is_the_prompts_text(api: Any) -> None:
    for prompt in ("hello world", [1, HELLO, WORLD], [HELLO, WORLD]):
        answer = api.complete(prompt=prompt, echo=True).json()
        assert answer["choices"][0]["text"] == "hello worldhello world"
    answer = api.complete(prompt=["hello", [WORLD]], echo=True, n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hellohello world"] * 2 + ["worldhello world"] * 2
    shown = api.complete(prompt=[1, HELLO], echo=True, skip_special_tokens=False).json()
    assert shown["choices"][0]["text"].startswith("<s> hello")


def test_an_echo_with_logprobs_tells_those_of_the_prompt_and_null_for_its_first_token(api: Any) -> None:
    api.engine.answer = "a"
    logprobs = api.complete(prompt="hello world", echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    token = api.deps.tokenizer.token_bytes[300].decode()
    assert logprobs == {
        "tokens": ["<s>", " hello", " world", token],
        "token_logprobs": [None, -0.25, -0.25, -0.25],
        "top_logprobs": [None, {" hello": -0.25}, {" world": -0.25}, {token: -0.25}],
        "text_offset": [0, 0, 5, 11],
    }, "offsets are those of the text, in which <s> has no characters and the first word no space"


@pytest.mark.parametrize("prompt", ["hello world", [HELLO, WORLD]], ids=str)
def test_no_tokens_after_an_echo_scores_the_prompt(api: Any, prompt: Any) -> None:
    answer = api.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=0).json()
    choice = answer["choices"][0]
    submit = api.engine.last
    assert (submit.max_tokens, submit.sampling.prompt_logprobs) == (0, 2)
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert len(choice["logprobs"]["tokens"]) == len(decode_prompt(submit.prompt))
    assert answer["usage"]["completion_tokens"] == 0


def test_no_tokens_without_an_echo_warms_the_cache(api: Any) -> None:
    for reply in (api.complete(max_tokens=0), api.chat(max_tokens=0), api.chat(max_completion_tokens=0)):
        choice = reply.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert (choice.get("text") or choice.get("message", {}).get("content")) == ("" if "message" in choice else None)
        assert (api.engine.last.max_tokens, api.engine.last.sampling.prompt_logprobs) == (0, None)
    events = api.chat(max_tokens=0, stream=True).events
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, "length"]


def test_a_streamed_echo_is_one_text_and_one_list_of_logprobs(api: Any) -> None:
    fields = {"prompt": ["hello world", "the"], "echo": True, "logprobs": 1, "n": 2, "seed": 1}
    whole = api.complete(**fields).json()["choices"]
    events = api.complete(**fields, stream=True).events[:-1]
    for index, expected in enumerate(whole):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        told = [part["logprobs"] for part in parts if part["logprobs"]]
        for name, values in expected["logprobs"].items():
            assert [value for part in told for value in part[name]] == values, name


def test_siblings_share_the_scores_of_their_prompt(api: Any) -> None:
    choices = api.complete(prompt=["hello world", "the"], n=2, prompt_logprobs=1).json()["choices"]
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"] != choices[2]["prompt_logprobs"]
    asked = [submit.sampling.prompt_logprobs for submit in api.engine.submits]
    assert asked == [1, None, 1, None], "a prompt is scored once"


def test_prompt_logprobs_have_vllms_form(api: Any) -> None:
    def engine(scores: tuple[TokenLogprob, ...]) -> Any:
        original = type(api.engine).submit

        def submit(requests: Any) -> Any:
            streams = original(api.engine, requests)
            request_id = requests[0].request_id
            api.engine.streams[request_id].push(Delta(request_id=request_id, prompt_logprobs=scores))
            api.engine.end(request_id, "stop")
            return streams

        return submit

    api.engine.answer = None
    likeliest = ((WORLD, -0.5), (HELLO, -1.0))
    api.engine.scores_itself = False
    api.engine.submit = engine((TokenLogprob(HELLO, -1.0, likeliest), TokenLogprob(5, -math.inf, likeliest)))
    world = {"logprob": -0.5, "rank": 1, "decoded_token": " world"}
    expected = [
        None,
        {str(WORLD): world, str(HELLO): {"logprob": -1.0, "rank": 2, "decoded_token": " hello"}},
        {
            str(WORLD): world,
            str(HELLO): {"logprob": -1.0, "rank": 2, "decoded_token": " hello"},
            "5": {"logprob": -9999.0, "rank": None, "decoded_token": "\x02"},
        },
    ]
    completion = api.complete(prompt=[1, HELLO, 5], prompt_logprobs=2).json()
    assert completion["choices"][0]["prompt_logprobs"] == expected
    assert api.chat(prompt_logprobs=2).json()["prompt_logprobs"] == expected


def test_the_scores_of_one_answer_are_bounded(api: Any) -> None:
    api.engine.scores_itself = False
    prompt = [5] * 500
    most = MAX_SCORES // 500 // 21
    fields = {"prompt": [prompt] * most, "max_tokens": 0}
    assert api.complete(**fields, prompt_logprobs=20).status == 200
    fields["prompt"] = [prompt] * (most + 1)
    for asked, param in (({"prompt_logprobs": 20}, "prompt_logprobs"), ({"echo": True, "logprobs": 20}, "logprobs")):
        refused = api.complete(**fields, **asked)
        assert (refused.error["param"], refused.error["code"]) == (param, "integer_above_max_value")


def test_two_tokens_with_one_text_are_told_apart(api: Any) -> None:
    byte, letter = 3 + ord("a"), api.deps.tokenizer.encode("xa", add_bos=False)[-1]
    api.engine.answer = None
    original = api.engine.submit

    def submit(requests: Any) -> Any:
        streams = original(requests)
        request_id = requests[0].request_id
        for chosen, logprob in ((byte, -1.5), (letter, -0.5), (HELLO, -4.0)):
            entry = TokenLogprob(chosen, logprob, ((letter, -0.5), (byte, -1.5), (200, -2)))
            delta = Delta(request_id=request_id, text="a", token_ids=(chosen,), logprobs=(entry,))
            api.engine.streams[request_id].push(delta)
        api.engine.end(request_id, "stop")
        return streams

    api.engine.submit = submit
    told = api.complete(logprobs=3).json()["choices"][0]["logprobs"]
    part = "bytes:\\xc5"
    assert told["tokens"] == ["a", "a", " hello"]
    assert told["top_logprobs"] == [
        {f"token_id:{letter}": -0.5, "a": -1.5, part: -2},
        {"a": -0.5, f"token_id:{byte}": -1.5, part: -2},
        {"a": -0.5, f"token_id:{byte}": -1.5, part: -2, " hello": -4.0},
    ], "the chosen token is there too, however unlikely"
    greedy = [
        value == max(top.values()) for value, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True)
    ]
    assert greedy == [False, True, False]


def test_token_ids_have_vllms_form(api: Any) -> None:
    prompt = [1, HELLO]
    choice = api.complete(prompt=prompt, return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, [300] * 11)
    chat = api.chat(return_token_ids=True).json()
    asked = decode_prompt(api.engine.last.prompt).tolist()
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == (asked, [300] * 11)
    events = api.chat(return_token_ids=True, stream=True).events[:-1]
    assert [event.get("prompt_token_ids") for event in events] == [asked] + [None] * (len(events) - 1)
    assert list(chain.from_iterable(event["choices"][0].get("token_ids", ()) for event in events)) == [300] * 11
    events = api.complete(prompt=prompt, return_token_ids=True, stream=True).events[:-1]
    assert events[0]["choices"][0]["prompt_token_ids"] == prompt
    assert list(chain.from_iterable(event["choices"][0].get("token_ids", ()) for event in events)) == [300] * 11


def test_counts_so_far_rise_to_those_of_the_last_chunk(api: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for send in (api.complete, api.chat):
        events = send(n=2, stream=True, stream_options=options).events[:-1]
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert counts[-2] == 22
        assert {event["usage"]["prompt_tokens"] for event in events} == {events[-1]["usage"]["prompt_tokens"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "hello world hello", "truncate_prompt_tokens": 3}, [1, WORLD, HELLO]),
        ({"prompt": "hello world hello", "truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, HELLO]),
        ({"prompt": "hello world hello", "truncate_prompt_tokens": 1}, [1]),
        ({"prompt": [5, 6, 7], "truncate_prompt_tokens": 2}, [6, 7]),
        ({"prompt": [5, 6, 7], "truncate_prompt_tokens": 3}, [5, 6, 7]),
        ({"prompt": "the " * 600, "truncate_prompt_tokens": 2, "add_special_tokens": False}, None),
        ({"prompt": [5] * 600, "truncate_prompt_tokens": -1, "max_tokens": 12}, [5] * 500),
        ({"prompt": [5] * 600, "truncate_prompt_tokens": -1, "max_tokens": 0}, [5] * 512),
        ({"prompt": [5] * 600, "truncate_prompt_tokens": -1}, [5] * 496),
        ({"prompt": [5] * 10, "truncate_prompt_tokens": -1}, [5] * 10),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_prompt_is_cut_where_that_is_asked_for(api: Any, fields: dict[str, Any], expected: list[int] | None) -> None:
    answer = api.complete(**fields)
    assert answer.status == 200, answer.body
    used = decode_prompt(api.engine.last.prompt).tolist()
    assert used == expected if expected is not None else len(used) == 2
    assert answer.json()["usage"]["prompt_tokens"] == len(used)


def test_a_long_conversation_is_cut_too(api: Any) -> None:
    messages = [{"role": "user", "content": "the " * 600}]
    assert api.chat(messages=messages).error["code"] == "context_length_exceeded"
    assert api.chat(messages=messages, truncate_prompt_tokens=100, max_tokens=5).status == 200
    assert len(decode_prompt(api.engine.last.prompt)) == 100
    assert api.chat(messages=messages, truncate_prompt_tokens=600).error["code"] == "context_length_exceeded"
    assert api.chat(messages=messages, truncate_prompt_tokens=-1).status == 200
