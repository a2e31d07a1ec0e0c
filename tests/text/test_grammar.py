"""Grammars: what they accept to the letter, what is refused and why, and that no schema costs more than its bound."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.text.detokenizer import TokenBytes
from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar import (
    MAX_GRAMMAR_BYTES,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
    user_grammar,
)
from mixtral_serve.text.grammar_limits import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH, MAX_SCHEMA_VALUES
from mixtral_serve.text.grammar_vocabulary import Matcher, Vocabulary
from mixtral_serve.text.tokenizer import Tokenizer

EOS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def byte_table() -> TokenBytes:
    return TokenBytes({0: b"<unk>", 1: b"<s>", EOS: b"</s>"} | {3 + i: bytes([i]) for i in range(256)}, (0, 1, EOS))


@pytest.fixture(scope="module")
def letters(byte_table: TokenBytes) -> Vocabulary:
    """Three control tokens and the bytes."""
    return Vocabulary(byte_table, eos_token_ids=(EOS,), vocab_size=len(byte_table))


def allowed(vocabulary: Vocabulary, matcher: Matcher) -> set[int]:
    (mask,) = vocabulary.fill([matcher])
    assert not isinstance(mask, GrammarError), mask
    bits = int.from_bytes(mask, "little")
    return {i for i in range(bits.bit_length()) if bits >> i & 1}


def ends(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    """Whether the grammar accepts exactly ``text``, byte by byte; masks and matchers must agree all the way."""
    matcher = vocabulary.compile(grammar)
    for byte in text.encode():
        if matcher.is_complete or 3 + byte not in allowed(vocabulary, matcher):
            return False
        matcher.consume(3 + byte)
    may_end = matcher.is_complete or EOS in allowed(vocabulary, matcher)
    assert may_end == matcher.is_accepting
    return may_end


@pytest.mark.parametrize("after_space", [True, False])
def test_a_chat_answer_begins_with_the_space_that_is_stripped_and_nothing_else_changes(letters, after_space) -> None:
    lead = " " if after_space else ""
    for grammar, text in (
        (regex_grammar("[a-z]+[0-9]", after_space=after_space), "ab1"),
        (regex_grammar(" x", after_space=after_space), " x"),
        (choice_grammar(["yes", "no"], after_space=after_space), "no"),
        (user_grammar('start: "(" start? ")"', after_space=after_space), "(())"),
        (user_grammar('root ::= "a" item*\nitem ::= [b-d]', after_space=after_space), "abcd"),
        (json_schema_grammar(PERSON, after_space=after_space), '{"name": "Zoë", "age": 3}'),
        (json_object_grammar(after_space=after_space), '{"a": [1, {"b":null}]}'),
    ):
        assert ends(letters, grammar, lead + text)
        assert not ends(letters, grammar, lead + text + " ")
        assert not ends(letters, grammar, lead + "  " + text)
        if after_space:
            assert not ends(letters, grammar, text)


def test_json_that_continues_a_prompt_may_begin_with_a_space(letters) -> None:
    grammar = json_schema_grammar({"type": "integer"}, after_space=False)
    assert ends(letters, grammar, " 12")
    assert ends(letters, grammar, "12")


def test_a_json_object_is_an_object_at_the_top(letters) -> None:
    for text in ("[1]", "1", '"a"', "null", "{", '{"a"}'):
        assert not ends(letters, json_object_grammar(after_space=False), text)


@pytest.mark.parametrize("text", ['{"name":"a","age":1}', '{"name": "a", "age": 1}'])
def test_json_has_at_most_one_blank_after_a_comma_and_a_colon_and_no_other_white_space(letters, text) -> None:
    grammar = json_schema_grammar(PERSON, after_space=False)
    assert ends(letters, grammar, text)
    for place in range(1, len(text)):
        if text[place - 1 : place] in (" ", "{", "}", "1") or text[place : place + 1] in (",", ":", "}"):
            spaced = text[:place] + "\n" + text[place:]
            assert not ends(letters, grammar, spaced)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_choice_is_accepted_to_the_letter_whatever_characters_it_has(choices: list[str]) -> None:
    vocabulary = _letters()
    grammar = choice_grammar(choices, after_space=True)
    for choice in choices:
        assert ends(vocabulary, grammar, " " + choice)
    assert not ends(vocabulary, grammar, " " + max(choices, key=len) + "x")


def _letters(kept: list[Vocabulary] = []) -> Vocabulary:  # noqa: B006 - made once; hypothesis takes no fixture of a test
    if not kept:
        table = TokenBytes(
            {0: b"<unk>", 1: b"<s>", EOS: b"</s>"} | {3 + i: bytes([i]) for i in range(256)}, (0, 1, EOS)
        )
        kept.append(Vocabulary(table, eos_token_ids=(EOS,), vocab_size=len(table)))
    return kept[0]


def test_end_of_sequence_is_allowed_exactly_where_the_grammar_accepts(letters) -> None:
    matcher = letters.compile(regex_grammar("a{2,3}", after_space=False))
    expected = [{3 + 97}, {3 + 97}, {3 + 97, EOS}]
    for tokens in expected:
        assert allowed(letters, matcher) == tokens
        matcher.consume(3 + 97)
    assert matcher.is_complete


def test_a_matcher_refuses_what_its_mask_forbids_and_gives_no_mask_afterwards(letters) -> None:
    matcher = letters.compile(regex_grammar("ab", after_space=False))
    healthy = matcher.copy()
    with pytest.raises(GrammarError):
        matcher.consume(3 + 98)
    failed, mask = letters.fill([matcher, healthy])
    assert isinstance(failed, GrammarError)
    assert not isinstance(mask, GrammarError)
    assert not matcher.is_complete
    assert not matcher.is_accepting


def test_a_copy_goes_its_own_way(letters) -> None:
    matcher = letters.compile(choice_grammar(["ab", "cd"], after_space=False))
    other = matcher.copy()
    matcher.consume(3 + ord("a"))
    assert allowed(letters, other) == {3 + ord("a"), 3 + ord("c")}
    assert allowed(letters, matcher) == {3 + ord("b")}


def test_all_ways_to_cut_a_text_into_tokens_are_open_but_byte_tokens_of_characters_that_have_a_piece(
    mixtral: Tokenizer, mixtral_vocabulary: Vocabulary
) -> None:
    matcher = mixtral_vocabulary.compile(json_schema_grammar(PERSON, after_space=True))
    pieces = [mixtral.token_bytes[i] for i in sorted(allowed(mixtral_vocabulary, matcher))]
    assert pieces == [b" {", b' {"', b" "]
    ids = {text: mixtral.encode(text, add_bos=False) for text in ('{"name": "Anna", "age": 41}',)}
    for text, tokens in ids.items():
        for token_id in tokens:  # the tokenizer's own cut begins with the space
            assert token_id in allowed(mixtral_vocabulary, matcher)
            matcher.consume(token_id)
        assert matcher.is_complete, text


def test_rows_of_a_head_that_the_tokenizer_does_not_know_are_never_allowed(byte_table) -> None:
    padded = Vocabulary(byte_table, eos_token_ids=(EOS,), vocab_size=len(byte_table) + 100)
    matcher = padded.compile(regex_grammar("(.|\n)*", after_space=False))
    assert max(allowed(padded, matcher)) < len(byte_table)
    assert padded.num_words == -(-(len(byte_table) + 100) // 32)


def nested(depth: int) -> dict[str, Any]:
    innermost: dict[str, Any] = {"type": "integer"}
    return reduce(lambda schema, _: {"type": "array", "items": schema}, range(depth), innermost)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (nested(MAX_SCHEMA_DEPTH), "levels deep"),
        ({"enum": list(range(MAX_SCHEMA_VALUES))}, "values"),
        ({"const": "x" * MAX_SCHEMA_BYTES}, "bytes"),
        ({"not": {"type": "string"}}, "keyword 'not'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"properties": {"a": {"if": {}}}}, "'if'"),
        ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
        ({"type": "strin"}, "'type'"),
        ({"required": "a"}, "'required'"),
        ({"enum": 3}, "'enum'"),
        ({"anyOf": {}}, "'anyOf' is not an array"),
        ({"properties": []}, "'properties' is not an object"),
        ({"items": 3}, "neither an object nor a boolean"),
        ({"multipleOf": 0}, "above 0"),
        ({"multipleOf": 1e-9}, "decimal places"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "common multiple"),
        ({"$ref": "#"}, "lead to each other"),
        ({"$ref": "http://example.org/s.json"}, "within the schema"),
    ],
)
def test_a_schema_beyond_the_limits_is_refused_with_the_reason(schema, reason) -> None:
    with pytest.raises(GrammarError, match=reason):
        json_schema_grammar(schema, after_space=True)


def test_a_schema_at_the_limits_and_annotations_pass(letters) -> None:
    letters.compile(json_schema_grammar(nested(MAX_SCHEMA_DEPTH - 1), after_space=True))
    letters.compile(json_schema_grammar({"type": "array", "title": "t", "default": [1], "x": 2}, after_space=True))
    letters.compile(json_schema_grammar({"properties": {"not": {"const": "if"}}}, after_space=True))
    letters.compile(json_schema_grammar({"properties": {"a": {"$ref": "#"}}}, after_space=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: json_schema_grammar({"$ref": "#/nowhere"}, after_space=True), "leads nowhere"),
        (lambda: json_schema_grammar({"minimum": 3, "maximum": 2, "type": "integer"}, after_space=True), "satisfies"),
        (lambda: json_schema_grammar({"type": "string", "minLength": -1}, after_space=True), "wrong kind"),
        (lambda: json_schema_grammar({"type": "string", "format": "secret"}, after_space=True), "'format'"),
        (lambda: json_schema_grammar({"type": "string", "pattern": "secret("}, after_space=True), "not valid"),
        (lambda: json_schema_grammar({"oneOf": [{}, {"type": "string"}]}, after_space=True), "'anyOf' always is"),
        (lambda: regex_grammar("(?=secret)a", after_space=True), "look-around"),
        (lambda: regex_grammar(r"(secret)\1", after_space=True), "back-references"),
        (lambda: regex_grammar("secret(", after_space=True), "not valid"),
        (lambda: regex_grammar("x" * (MAX_GRAMMAR_BYTES + 1), after_space=True), "larger than"),
        (lambda: choice_grammar([], after_space=True), "at least one choice"),
        (lambda: choice_grammar(["a", ""], after_space=True), "at least one choice"),
        (lambda: choice_grammar(["a"] * 1025, after_space=True), "more than 1024"),
        (lambda: user_grammar("secret", after_space=True), "neither a Lark"),
        (lambda: user_grammar("root ::= " + "(" * 5000, after_space=True), "neither a Lark"),
        (lambda: user_grammar("start: secret", after_space=True), "not a valid grammar"),
        (lambda: user_grammar("start: " + "(" * 900 + '"a"' + ")" * 900, after_space=True), "too complex"),
        (lambda: user_grammar("start: @body", after_space=False), "nothing satisfies"),
        (lambda: user_grammar("start: @body", after_space=True), "nothing satisfies"),
        (lambda: user_grammar('start: "a" </s>', after_space=True), "control token"),
        (lambda: user_grammar("start: <[1]> /a/", after_space=True), "control token"),
    ],
)
def test_what_does_not_compile_is_refused_with_a_reason_that_repeats_no_input(letters, make, reason) -> None:
    with pytest.raises(GrammarError, match=reason) as refusal:
        letters.compile(make())
    assert "secret" not in str(refusal.value)


def test_a_grammar_may_speak_of_angle_brackets_in_strings_expressions_and_comments(letters) -> None:
    grammar = user_grammar('start: "<s>" /<[a-z]>/ // <b>\n', after_space=False)
    assert ends(letters, grammar, "<s><x>")


@pytest.mark.parametrize("text", ['start: "a', "start: /a", 'start: "a" "', 'start: "<s>'])
def test_a_string_or_expression_without_an_end_is_refused(text: str) -> None:
    with pytest.raises(GrammarError, match="without an end"):
        user_grammar(text, after_space=False)
