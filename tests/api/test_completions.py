from __future__ import annotations

from array import array
from typing import Any

import pytest

from mixtral_serve.engine.messages import Delta, Submit
from scheduler.events import TokenLogprob


def prompt_ids(submit: Submit) -> list[int]:
    ids = array("i")
    ids.frombytes(submit.prompt)
    return ids.tolist()


def test_a_completion_has_openais_form(api: Any) -> None:
    answer = api.complete().json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer == {
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "system_fingerprint": "fp_test",
        "choices": [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 12,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


def test_a_text_prompt_gets_a_beginning_and_ids_are_taken_as_they_are(api: Any) -> None:
    api.complete(prompt="hello")
    assert prompt_ids(api.engine.last)[0] == 1
    api.complete(prompt=[5, 6, 7])
    assert prompt_ids(api.engine.last) == [5, 6, 7]
    assert not api.engine.last.strip_leading_space, "a completion goes on where the prompt ended"
    assert api.engine.last.max_tokens == 16


def test_a_given_seed_holds_for_every_prompt(api: Any) -> None:
    api.complete(prompt=["a", "b"], seed=9)
    assert [(submit.sampling.seed, submit.sampling.choice) for submit in api.engine.submits] == [(9, 0), (9, 0)]


def test_the_default_of_16_tokens_is_cut_to_the_context(api: Any) -> None:
    api.complete(prompt=[5] * 505)
    assert api.engine.last.max_tokens == 7


@pytest.mark.parametrize("prompt", [["a", "b"], [[5], [6, 7]], ["a", [6, 7]]], ids=str)
def test_many_prompts_times_n_choices_are_numbered_in_order(api: Any, prompt: list[Any]) -> None:
    answer = api.complete(prompt=prompt, n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    first, second, third, _ = api.engine.submits
    assert first.prompt == second.prompt != third.prompt
    assert [submit.sampling.choice for submit in api.engine.submits] == [0, 1, 0, 1]
    assert first.sampling.seed != third.sampling.seed, "equal prompts without a seed must not give equal answers"
    prompts = [prompt_ids(first), prompt_ids(third)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


def test_logprobs_have_openais_older_form(api: Any) -> None:
    api.engine.answer = None
    original = api.engine.submit
    hello = api.deps.tokenizer.encode("hello", add_bos=False)[0]

    def submit(requests: Any) -> Any:
        streams = original(requests)
        request_id = requests[0].request_id
        for _ in range(2):
            entry = TokenLogprob(token_id=hello, logprob=-1.0, top=((hello, -1.0),))
            delta = Delta(request_id=request_id, text=" hello", token_ids=(hello,), logprobs=(entry,))
            api.engine.streams[request_id].push(delta)
        api.engine.end(request_id, "length", num_output_tokens=2)
        return streams

    api.engine.submit = submit
    assert api.complete(logprobs=1).json()["choices"][0]["logprobs"] == {
        "tokens": [" hello", " hello"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{" hello": -1.0}, {" hello": -1.0}],
        "text_offset": [0, 6],
    }
    events = api.complete(logprobs=1, stream=True).events
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events[:2]] == [[0], [6]]


def test_a_stream_of_completions(api: Any) -> None:
    api.engine.answer = "hi"
    events = api.complete(stream=True, stream_options={"include_usage": True}).events
    assert events[-1] == "[DONE]"
    assert [event["choices"][0]["text"] for event in events[:-2]] == ["h", "i", ""]
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == [None, None, "stop"]
    assert all(event["object"] == "text_completion" and event["usage"] is None for event in events[:-2])
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 3
    assert len({event["id"] for event in events[:-1]}) == 1
