from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.api.app import create_app
from mixtral_serve.engine.messages import Delta, Submit
from scheduler.events import TokenLogprob


def prompt_ids(submit: Submit) -> list[int]:
    ids = array("i")
    ids.frombytes(submit.prompt)
    return ids.tolist()


def test_a_chat_completion_has_openais_form(api: Any) -> None:
    reply = api.chat()
    answer = reply.json()
    assert reply.status == 200
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer == {
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "system_fingerprint": "fp_test",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt_ids(api.engine.last)),
            "completion_tokens": 12,
            "total_tokens": len(prompt_ids(api.engine.last)) + 12,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


def test_the_prompt_is_the_templates(api: Any) -> None:
    api.chat(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi </s>"}])
    ids = prompt_ids(api.engine.last)
    text = api.deps.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<s> [INST] be kind\n\nhi </s> [/INST]"
    assert [token_id for token_id in ids if token_id < 3] == [1]


def test_text_parts_are_joined(api: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    api.chat(messages=[{"role": "user", "content": parts}])
    assert "one\ntwo" in api.deps.tokenizer.decode(prompt_ids(api.engine.last))


def test_parameters_reach_the_engine(api: Any) -> None:
    api.chat(
        max_completion_tokens=7,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=40,
        min_p=0.1,
        seed=-1,
        stop="END",
        stop_token_ids=[5, 6],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        priority=-3,
        cache_salt="salt",
        logprobs=True,
        top_logprobs=4,
    )
    submit = api.engine.last
    sampling = submit.sampling
    assert (submit.max_tokens, submit.min_tokens, submit.stop, submit.stop_token_ids) == (7, 2, ("END",), (5, 6))
    assert (submit.ignore_eos, submit.include_stop, submit.skip_special_tokens) == (True, True, False)
    assert (submit.priority, submit.cache_salt, submit.strip_leading_space) == (-3, "salt", True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 40, 0.1)
    assert (sampling.seed, sampling.logprobs, sampling.choice) == (2**64 - 1, 4, 0)


def test_defaults_are_openais(api: Any) -> None:
    api.chat()
    api.chat()
    first, second = api.engine.submits
    assert first.max_tokens == 512 - len(prompt_ids(first)), "the rest of the context"
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.sampling.logprobs is None
    assert first.sampling.seed != second.sampling.seed, "drawn where none is given"


def test_the_older_name_of_max_completion_tokens_works(api: Any) -> None:
    api.chat(max_tokens=5)
    assert api.engine.last.max_tokens == 5
    api.chat(max_tokens=5, max_completion_tokens=5)
    assert api.engine.last.max_tokens == 5
    assert api.chat(max_tokens=5, max_completion_tokens=6).error["param"] == "max_completion_tokens"


def test_n_choices_are_n_submits_that_differ_in_their_choice_alone(api: Any) -> None:
    answer = api.chat(n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    submits = api.engine.submits
    assert [submit.sampling.choice for submit in submits] == [0, 1, 2]
    assert {(submit.sampling.seed, submit.prompt) for submit in submits} == {(5, submits[0].prompt)}
    assert len({submit.request_id for submit in submits}) == 3
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids(submits[0])), "the prompt counts once"
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_length_is_told(api: Any) -> None:
    api.engine.answer = None
    original = api.engine.submit

    def submit(requests: Any) -> Any:
        streams = original(requests)
        api.engine.say(requests[0].request_id, "hel", reason="length")
        return streams

    api.engine.submit = submit
    assert api.chat(max_tokens=3).json()["choices"][0]["finish_reason"] == "length"


def test_logprobs_have_openais_form(api: Any) -> None:
    api.engine.answer = None
    original = api.engine.submit
    logprob = TokenLogprob(token_id=198, logprob=-0.5, top=((198, -0.5), (262, float("-inf"))))

    def submit(requests: Any) -> Any:
        streams = original(requests)
        request_id = requests[0].request_id
        api.engine.streams[request_id].push(
            Delta(request_id=request_id, text="", token_ids=(198,), logprobs=(logprob,))
        )
        api.engine.end(request_id, "stop", num_output_tokens=1)
        return streams

    api.engine.submit = submit
    token = {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]}
    expected = {
        "content": [token | {"top_logprobs": [token, api_token(api, 262) | {"logprob": -9999.0}]}],
        "refusal": None,
    }
    assert api.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"] == expected
    streamed = api.chat(logprobs=True, top_logprobs=2, stream=True).events
    assert [e["choices"][0]["logprobs"] for e in streamed[:-1]] == [None, expected, None]


def api_token(api: Any, token_id: int) -> dict[str, Any]:
    piece = api.deps.tokenizer.token_bytes[token_id]
    return {"token": piece.decode(), "bytes": list(piece)}


NEUTRAL = [
    {"frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"logit_bias": {}},
    {"n": 1},
    {"store": False},
    {"user": "me"},
    {"metadata": {"a": "b"}},
    {"safety_identifier": "x", "prompt_cache_key": "y"},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}},
    {"service_tier": "auto"},
    {"chat_template": None, "tools": None, "stop": None, "max_tokens": None, "stream_options": None},
    {"stop": []},
    {"top_k": -1},
    {"metadata": {}},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_fields_that_ask_for_nothing_are_accepted(api: Any, fields: dict[str, Any]) -> None:
    assert api.chat(**fields).status == 200


def test_the_answer_of_an_official_client_can_be_sent_back(api: Any) -> None:
    echoed = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    messages = [{"role": "user", "content": "a"}, echoed, {"role": "user", "content": "c"}]
    assert api.chat(messages=messages).status == 200


UNSUPPORTED = {
    "best_of": 2,
    "store": True,
    "functions": [{}],
    "modalities": ["audio"],
    "audio": {},
    "prediction": {},
    "reasoning_effort": "low",
    "web_search_options": {},
    "chat_template": "{{ 1 }}",
    "chat_template_kwargs": {"tokenize": True},
    "service_tier": "flex",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_row12_what_is_not_implemented_is_refused_by_name(api: Any, name: str) -> None:
    reply = api.chat(**{name: UNSUPPORTED[name]})
    assert reply.status == 400
    assert (reply.error["code"], reply.error["param"]) == ("unsupported_parameter", name)
    api.assert_alive()


def test_row12_unknown_fields_are_refused_by_name(api: Any) -> None:
    for fields, param in (
        ({"temprature": 1}, "temprature"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
    ):
        reply = api.chat(**fields)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "unknown_parameter", param)


def test_unknown_fields_are_a_warning_where_the_operator_says_so(api: Any) -> None:
    lenient = api.with_settings(unknown_fields="warn")
    reply = lenient.chat(temprature=1, messages=[{"role": "user", "content": "a", "colour\u00e9": 1}])
    assert reply.status == 200
    assert reply.headers["x-mixtral-serve-warning"] in (
        "ignored: temprature, messages[0].colour?",
        "ignored: messages[0].colour?, temprature",
    )
    assert "x-mixtral-serve-warning" not in lenient.chat().headers
    assert "temprature" in lenient.chat(temprature=1, stream=True).headers["x-mixtral-serve-warning"]
    assert lenient.chat(temprature=1, temperature=9).error["param"] == "temperature"
    known = lenient.chat(best_of=3, temprature=1)
    assert known.headers["x-mixtral-serve-warning"] == "ignored: best_of, temprature", "as is what is known but missing"


def test_a_model_without_a_chat_template_says_so(api: Any) -> None:
    deps = replace(api.deps, chat_template=None)
    bare = type(api)(create_app(deps), api.engine, deps)
    assert (bare.chat().status, bare.chat().error["param"]) == (400, "messages")
    assert bare.complete().status == 200
