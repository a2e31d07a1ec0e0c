from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar_vocabulary import Vocabulary
from mixtral_serve.text.tokenizer import Tokenizer
from mixtral_serve.text.tool_calls import CallReader
from mixtral_serve.text.tool_grammar import MAX_CALLS, OPENING, CallableFunction, tool_grammar

WEATHER = CallableFunction(
    "weather",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
TIME = CallableFunction("time", {"additionalProperties": False})
ONE = '[{"name": "weather", "arguments": {"city": "a"}}]'
TWO = '[{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"city": "a", "days": 3}}]'
FIRST_BYTE = 3


@pytest.fixture(scope="module")
def vocabulary(tiny: Tokenizer) -> Vocabulary:
    """Of whose tokens the bytes suffice to spell everything."""
    return Vocabulary(tiny.token_bytes, eos_token_ids=(2,), vocab_size=tiny.vocab_size)


def byte_tokens(text: str, tiny: Tokenizer) -> list[int]:
    """``text`` in the smallest pieces. A character with a token of its own is that token."""
    singles = {tiny.token_bytes[i]: i for i in range(tiny.vocab_size) if len(tiny.token_bytes[i]) == 1}
    return [singles[bytes([byte])] for byte in text.encode()]


class Judge:
    def __init__(self, vocabulary: Vocabulary, tiny: Tokenizer) -> None:
        self._vocabulary = vocabulary
        self._tiny = tiny

    def says(self, text: str, *functions: CallableFunction, **options: Any) -> str:
        """Whether an answer of ``text`` is "whole" (nothing can follow), "fine", "unfinished" or "refused"."""
        chosen = {"parallel": True, "text_allowed": True, **options}
        matcher = self._vocabulary.compile(tool_grammar(functions or (WEATHER, TIME), **chosen))
        try:
            for token_id in byte_tokens(" " + text, self._tiny):
                matcher.consume(token_id)
        except GrammarError:
            return "refused"
        if matcher.is_complete:
            return "whole"
        return "fine" if matcher.is_accepting else "unfinished"


@pytest.fixture(scope="module")
def judge(vocabulary: Vocabulary, tiny: Tokenizer) -> Judge:
    return Judge(vocabulary, tiny)


@pytest.mark.parametrize("text_allowed", [True, False])
def test_calls_are_whole_when_they_are_complete(judge: Judge, text_allowed: bool) -> None:
    assert judge.says(ONE, text_allowed=text_allowed) == "whole"
    assert judge.says(TWO, text_allowed=text_allowed) == "whole"
    assert judge.says(ONE, text_allowed=text_allowed, parallel=False) == "whole"
    assert judge.says(TWO, text_allowed=text_allowed, parallel=False) == "refused"


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "rain", "arguments": {}}]',
        '[{"name": "time", "arguments": {"city": "a"}}]',
        '[{"name": "weather", "arguments": {}}]',
        '[{"name": "weather", "arguments": {"city": 1}}]',
        '[{"name": "time"}]',
        '[{"name": "time", "arguments": {}} and so on',
        ONE + " and so on",
    ],
)
def test_what_begins_as_a_call_is_a_valid_one(judge: Judge, text: str) -> None:
    assert judge.says(text) == "refused"


@pytest.mark.parametrize("text", ["", "hello", "[", "[1, 2]", '[{"name', '[{"nam": 1}]', "two\nlines, é"])
def test_text_is_anything_that_does_not_begin_as_a_call(judge: Judge, text: str) -> None:
    assert judge.says(text) == "fine"
    assert judge.says(text, text_allowed=False) in ("refused", "unfinished")


def test_a_beginning_is_neither_once_it_is_a_call(judge: Judge) -> None:
    assert judge.says(OPENING[:-1]) == "fine"
    assert judge.says(OPENING) == "unfinished"


def test_the_number_of_calls_is_bounded(judge: Judge) -> None:
    calls = ['{"name": "time", "arguments": {}}'] * (MAX_CALLS + 1)
    assert judge.says("[" + ", ".join(calls[1:]) + "]", TIME) == "whole"
    assert judge.says("[" + ", ".join(calls), TIME) == "refused"


def test_text_of_a_schema_of_its_own_goes_beside_calls(judge: Judge) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text, verdict in (('{"a": 1}', "whole"), ('{"a": "x"}', "refused"), ("hello", "refused"), (ONE, "whole")):
        assert judge.says(text, answer_schema=schema) == verdict
    assert judge.says('{"a": 1}', answer_schema=schema, text_allowed=False) == "refused"


def test_as_many_functions_as_a_request_may_have_compile(vocabulary: Vocabulary) -> None:
    functions = [CallableFunction(f"function_number_{i}", WEATHER.parameters) for i in range(128)]
    vocabulary.compile(tool_grammar(functions, parallel=True, text_allowed=True))


SCHEMAS = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"enum": ["x", 'y"', "}]"]}}, "additionalProperties": False},
        {"properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}, "required": ["a"]},
    ]
)


@given(schema=SCHEMAS, seed=st.randoms(use_true_random=False))
def test_whatever_the_grammar_lets_through_is_read_as_calls_with_parsing_arguments(
    vocabulary: Vocabulary, tiny: Tokenizer, schema: dict[str, Any], seed: Any
) -> None:
    """A model that samples wildly, among the tokens that the mask allows."""
    matcher = vocabulary.compile(tool_grammar([CallableFunction("f", schema)], parallel=True, text_allowed=False))
    written = b""
    for _ in range(200):
        if matcher.is_complete:
            break
        closing = [i for i in byte_tokens('"}]', tiny) if matcher.allows(i)]
        allowed = [i for i in range(FIRST_BYTE, tiny.vocab_size) if tiny.token_bytes[i].isascii() and matcher.allows(i)]
        token_id = seed.choice(closing if closing and seed.random() < 0.5 else allowed)
        matcher.consume(token_id)
        written += tiny.token_bytes[token_id]
    if matcher.is_complete:
        reader = CallReader()
        reader.push(written.decode().removeprefix(" "))
        assert reader.is_complete
        assert all(call["name"] == "f" and isinstance(call["arguments"], dict) for call in json.loads(written))
