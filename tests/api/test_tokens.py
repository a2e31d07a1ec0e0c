"""Tokens and texts: what is counted is what would be computed, and the way back gives the text again."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest

from mixtral_serve.api.app import create_app

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello </s>"}]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_is_encoded_and_decoded_again(api: Any, prefix: str) -> None:
    tokenizer = api.deps.tokenizer
    reply = api.call("POST", f"{prefix}/tokenize", {"model": "tiny", "prompt": "hello wörld"})
    ids = list(tokenizer.encode("hello wörld", add_bos=True))
    assert reply.json() == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    bare = api.call("POST", f"{prefix}/tokenize", {"prompt": "hello wörld", "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    back = api.call("POST", f"{prefix}/detokenize", {"tokens": bare["tokens"]})
    assert back.json() == {"prompt": "hello wörld"}


def test_each_token_is_shown_where_it_is_asked_for(api: Any) -> None:
    answer = api.call("POST", "/tokenize", {"prompt": "hello", "return_token_strs": True}).json()
    assert answer["token_strs"][0] == "<s>"
    assert "".join(answer["token_strs"][1:]) == " hello"


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Well"}], "continue_final_message": True},
    ],
)
def test_a_conversation_is_encoded_as_it_would_be_answered(api: Any, path: str, fields: dict[str, Any]) -> None:
    answer = api.call("POST", path, fields).json()
    assert api.chat(**fields).status == 200
    assert answer["tokens"] == list(array("i", api.engine.last.prompt))
    assert answer["count"] == len(answer["tokens"])


def test_the_template_shows_the_text_of_what_is_computed(api: Any) -> None:
    answer = api.call("POST", "/v1/apply-template", {"messages": [{"role": "user", "content": "hello"}]}).json()
    assert answer["prompt"].startswith("<s>")
    assert "[INST]" in answer["prompt"]
    assert "hello" in answer["prompt"]


def test_a_text_may_be_longer_than_the_context(api: Any) -> None:
    assert api.call("POST", "/tokenize", {"prompt": "x " * 20_000}).json()["count"] > 20_000
    long = [{"role": "user", "content": "x " * 20_000}]
    assert api.call("POST", "/tokenize", {"messages": long}).json()["count"] > 20_000


def test_facts_of_the_tokenizer(api: Any) -> None:
    facts = api.call("GET", "/tokenizer_info").json()
    assert facts == api.call("GET", "/v1/tokenizer_info").json()
    assert facts["vocab_size"] == api.deps.tokenizer.vocab_size
    assert (facts["bos_token"], facts["bos_token_id"], facts["eos_token"]) == ("<s>", 1, "</s>")
    assert facts["has_chat_template"] is True


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, "prompt", "missing_required_parameter"),
        ("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt", "unknown_parameter"),
        ("/tokenize", {"messages": []}, "messages", "empty_array"),
        ("/tokenize", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template", "unsupported_parameter"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_special_tokens": True},
            "add_special_tokens",
            "unsupported_parameter",
        ),
        ("/apply-template", {}, "messages", "missing_required_parameter"),
        ("/apply-template", {"messages": MESSAGES, "colour": 1}, "colour", "unknown_parameter"),
        ("/detokenize", {}, "tokens", "missing_required_parameter"),
        ("/detokenize", {"tokens": "x"}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [1.5]}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [True]}, "tokens", "invalid_type"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [2**40]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [100_000]}, "tokens", "invalid_value"),
        ("/detokenize", {"tokens": [5], "model": "other"}, "model", "model_not_found"),
    ],
)
def test_what_cannot_be_is_refused_by_name(api: Any, path: str, body: dict[str, Any], param: str, code: str) -> None:
    reply = api.call("POST", path, body)
    assert reply.status == (404 if code == "model_not_found" else 400)
    assert (reply.error["param"], reply.error["code"]) == (param, code)


def test_no_tokens_are_no_text(api: Any) -> None:
    assert api.call("POST", "/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_without_a_chat_template_there_is_no_conversation_to_encode(api: Any) -> None:
    deps = replace(api.deps, chat_template=None)
    base = type(api)(create_app(deps), api.engine, deps)
    assert base.call("POST", "/apply-template", {"messages": MESSAGES}).error["param"] == "messages"
    assert base.call("GET", "/tokenizer_info").json()["has_chat_template"] is False
