"""Grammars made to cost much: none takes long, and none holds more memory than it is charged for."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar import (
    json_schema_grammar,
    regex_grammar,
    user_grammar,
)
from mixtral_serve.text.grammar_vocabulary import MATCHER_BYTES, Matcher, Vocabulary


def hostile() -> Iterable[tuple[str, Callable[[], str]]]:
    """Schemas and grammars that are made to cost time or memory."""

    def schema(value: dict[str, Any]) -> Callable[[], str]:
        return lambda: json_schema_grammar(value, after_space=True)

    def branches(number: int, width: int) -> dict[str, Any]:
        return {"anyOf": [{"type": "object", "properties": {f"p{number}": {"const": k}}} for k in range(width)]}

    def chain(keyword: str, length: int) -> dict[str, Any]:
        links: dict[str, Any] = {
            f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}]}
            for i in range(length)
        }
        return {"$defs": links | {f"d{length}": {"type": "object"}}, "$ref": "#/$defs/d0"}

    yield "many items", schema({"type": "array", "items": {"type": "string"}, "minItems": 10**6, "maxItems": 10**9})
    yield "long string", schema({"type": "string", "minLength": 10**6, "maxLength": 10**9})
    yield "large enum", schema({"enum": [f"{i * 7919:x}" for i in range(6000)]})
    yield "many properties", schema({"type": "object", "properties": {f"p{i}": {} for i in range(2500)}})
    yield "huge multiple", schema({"type": "integer", "multipleOf": 9999})
    yield "multiples", schema({"anyOf": [{"multipleOf": 9999, "type": "integer", "minimum": i} for i in range(60)]})
    for number, width in ((9, 2), (10, 2), (12, 2), (6, 3), (7, 3), (5, 5), (3, 16), (2, 100)):
        yield f"product {width}^{number}", schema({"allOf": [branches(i, width) for i in range(number)]})
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield f"chain {keyword}", schema(chain(keyword, 24))
    wide = {"o": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}}
    merged = {f"q{i}": {"$ref": "#/$defs/o", "properties": {f"z{i}": {"type": "string"}}} for i in range(200)}
    yield "merged objects", schema({"$defs": wide, "type": "object", "properties": merged})
    for pattern in (
        "(a{1,500}){1,500}",
        "((a{1,100}){1,100}){1,100}",
        "(.*a){30}.{30}",
        "(x+x+)+y",
        "(a|b)*a(a|b){40}",
    ):
        yield f"pattern {pattern}", schema({"type": "string", "pattern": pattern})
        yield f"regex {pattern}", lambda pattern=pattern: regex_grammar(pattern, after_space=True)
    yield "unicode", lambda: regex_grammar(r"((\p{L}{1,50}|\p{Greek}){1,50} ){1,50}", after_space=True)
    yield "nested repeats", lambda: regex_grammar("(" * 60 + "a" + "){1,9}" * 60, after_space=True)
    doubling = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x" | '
    yield "doubling rules", lambda: user_grammar(doubling, after_space=True)
    yield "ambiguous rules", lambda: user_grammar('start: a\na: a a | "a" | ', after_space=True)
    yield "complement", lambda: user_grammar("start: A\nA: ~/(?s:.*)(a.{30}b)(?s:.*)/ & /(?s:.*)/", after_space=True)


@pytest.mark.parametrize(("name", "make"), [pytest.param(name, make, id=name) for name, make in hostile()])
def test_no_hostile_grammar_costs_a_second_or_a_hundred_megabytes(mixtral_vocabulary, name, make) -> None:
    del name
    began_bytes, began_s = _resident_bytes(), time.process_time()
    try:
        matcher = mixtral_vocabulary.compile(make())
    except GrammarError:
        matcher = None
    if matcher is not None:
        _wander(mixtral_vocabulary, matcher, num_tokens=30)
    assert time.process_time() - began_s < 1.0
    assert _resident_bytes() - began_bytes < 100 << 20


_GROW = """
import ctypes, json, resource, sys
from pathlib import Path
from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar_vocabulary import Vocabulary
from mixtral_serve.text.tokenizer import load_tokenizer

def resident_bytes():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()

tokenizer, case = load_tokenizer(Path(sys.argv[1])), json.load(sys.stdin)
vocabulary = Vocabulary(tokenizer.token_bytes, eos_token_ids=(2,), vocab_size=tokenizer.vocab_size)
ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken, and nothing grow
began_bytes, largest, error = resident_bytes(), 0, None
matchers = [vocabulary.compile(case["grammar"]).copy() for _ in range(case["matchers"])]
for token_id in case["token_ids"]:
    for matcher in matchers:
        matcher.consume(token_id)
    mask = vocabulary.fill(matchers)[0]
    largest = max(largest, resident_bytes() - began_bytes)
    if isinstance(mask, GrammarError):
        error = str(mask)
        break
print(json.dumps([largest, error]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strings", "terminals"])
def test_a_matcher_never_holds_more_than_it_is_charged_for(mixtral_checkpoint, sentencepiece_model, kind) -> None:
    """Many strings or terminals that all stay possible: each state of the lexer holds them all.

    In a process of its own, where nothing else grows meanwhile.
    """
    if kind == "strings":
        branches = [{"type": "string", "minLength": i, "maxLength": 100_000 + i} for i in range(200)]
        grammar, opening = json_schema_grammar({"anyOf": branches}, after_space=False), ['"']
    else:
        rules = [f"T{i}: /[a-z]{{{i + 1},{i + 300}}}[a-z]*{chr(97 + i % 26)}/" for i in range(90)]
        start = "start: (" + "|".join(f"T{i}" for i in range(90)) + ")*"
        grammar, opening = user_grammar("\n".join([start, *rules]), after_space=False), []
    pieces = [*opening, *("the", "ing", "er", "all", "with", "ation", "q", "z") * 300]
    token_ids = [sentencepiece_model.piece_to_id(piece) for piece in pieces]
    case = {"grammar": grammar, "matchers": 3, "token_ids": token_ids}
    done = subprocess.run(
        [sys.executable, "-c", _GROW, str(mixtral_checkpoint)],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        check=True,
    )
    largest, error = json.loads(done.stdout)
    assert "too complex" in error, "it went on until its limits stopped it"
    assert 0 < largest <= case["matchers"] * MATCHER_BYTES


def _wander(vocabulary: Vocabulary, matcher: Matcher, *, num_tokens: int) -> None:
    """Take the largest allowed token again and again, until the grammar ends or gives up."""
    for _ in range(num_tokens):
        (mask,) = vocabulary.fill([matcher])
        if isinstance(mask, GrammarError):
            return
        try:
            matcher.consume(int.from_bytes(mask, "little").bit_length() - 1)
        except GrammarError:
            return
        if matcher.is_complete:
            return


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    "hostile",
    [
        'start: "a"\n' + '\\"' * 30_000,
        'start: "a"\n' + "\\/" * 30_000,
        "root ::= " + "\n" * 60_000,
        "root ::= a0\n" + "".join([f'a{i} ::= "x" a{i + 1}\n' for i in range(2_500)]) + 'a2500 ::= "x"',
    ],
    ids=["strings", "expressions", "blank lines", "rules"],
)
def test_what_a_grammar_says_is_looked_at_in_time_linear_in_it(hostile: str) -> None:
    """All of this holds the interpreter lock: a quadratic look would stop the whole process for many seconds."""
    started_s = time.process_time()
    with contextlib.suppress(GrammarError):
        user_grammar(hostile, after_space=True)
    assert time.process_time() - started_s < 1
