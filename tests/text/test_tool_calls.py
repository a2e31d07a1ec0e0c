from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.text.errors import MalformedCallError
from mixtral_serve.text.tool_calls import ArgumentsPiece, CallEvent, CallReader, CallStarted, TextPiece
from mixtral_serve.text.tool_grammar import OPENING

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[],: é😀\n', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(alphabet='a"}\\', max_size=3), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "get_weather", "a-b_C9"]), ARGUMENTS), min_size=1, max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    """``text`` in pieces; some of them empty."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[left:right] for left, right in pairwise(edges)]


def joined(events: list[CallEvent]) -> list[tuple[Any, ...]]:
    """Events with neighbouring pieces put together."""
    whole: list[list[Any]] = []
    for event in events:
        match event:
            case CallStarted(index, name):
                whole.append(["call", index, name, ""])
            case ArgumentsPiece(index, text):
                assert whole[-1][:2] == ["call", index], "arguments belong to the call that began last"
                assert text, "no event without news"
                whole[-1][3] += text
            case TextPiece(text):
                assert text, "no event without news"
                if whole:
                    whole[-1][1] += text
                else:
                    whole.append(["text", text])
    return [tuple(entry) for entry in whole]


def read(pieces: list[str], *, cut_short: bool = False) -> tuple[list[tuple[Any, ...]], CallReader]:
    reader = CallReader()
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish(cut_short=cut_short)
    return joined(events), reader


def spelled(calls: list[tuple[str, dict[str, Any]]], *, ascii_only: bool = False) -> str:
    described = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return json.dumps(described, ensure_ascii=ascii_only)


@given(calls=CALLS, places=st.lists(st.integers(0, 400), max_size=12), ascii_only=st.booleans())
def test_calls_come_out_as_they_were_written_however_the_text_is_cut(
    calls: list[tuple[str, dict[str, Any]]], places: list[int], ascii_only: bool
) -> None:
    text = spelled(calls, ascii_only=ascii_only)
    found, reader = read(cut(text, places))
    assert found == [
        ("call", index, name, json.dumps(arguments, ensure_ascii=ascii_only))
        for index, (name, arguments) in enumerate(calls)
    ]
    assert reader.has_calls
    assert reader.is_complete
    assert read(list(text))[0] == found


TEXTS = st.text(alphabet='[{"name: x1]\n', max_size=16) | st.sampled_from(
    ["[1, 2]", '[{"nam', '[{"name": 3}]', "{}", "é"]
)


@given(text=TEXTS.filter(lambda text: not text.startswith(OPENING)), places=st.lists(st.integers(0, 20), max_size=4))
def test_what_does_not_begin_like_a_call_is_text_to_the_letter(text: str, places: list[int]) -> None:
    found, reader = read(cut(text, places))
    assert found == ([("text", text)] if text else [])
    assert not reader.has_calls


def test_the_decision_falls_at_the_first_character_that_makes_it() -> None:
    reader = CallReader()
    assert [reader.push(character) for character in '[{"name"'] == [[]] * 8
    assert reader.push("x") == [TextPiece('[{"name"x')]
    assert reader.push(' [{"name": "f", ') == [TextPiece(' [{"name": "f", ')], "text stays text"
    reader = CallReader()
    assert reader.push("H") == [TextPiece("H")]
    reader = CallReader()
    assert reader.push('[{"name": "f", "arguments": ') == [CallStarted(0, "f")]
    assert reader.push('{"a": ') == [ArgumentsPiece(0, '{"a": ')]


@given(calls=CALLS, length=st.integers(0, 200))
def test_an_answer_that_is_cut_short_shows_no_json_as_text(
    calls: list[tuple[str, dict[str, Any]]], length: int
) -> None:
    text = spelled(calls)
    found, reader = read([text[:length]], cut_short=True)
    assert all(entry[0] == "call" for entry in found)
    assert reader.is_complete == (length >= len(text))
    for (_, _, name, arguments), (expected, value) in zip(found, calls, strict=False):
        assert name == expected
        assert json.dumps(value, ensure_ascii=False).startswith(arguments)


def test_an_undecided_beginning_is_text_when_the_answer_ended_by_itself() -> None:
    assert read(["["])[0] == [("text", "[")]
    assert read(["["], cut_short=True)[0] == []


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "f", "parameters": {}}]',
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": "f", "arguments": {}}, 5]',
        '[{"name": "f", "arguments": {}}] and more',
        '[{"name": "f"}]',
    ],
)
def test_what_is_no_call_after_all_is_an_error_and_never_text(text: str) -> None:
    for pieces in ([text], list(text)):
        with pytest.raises(MalformedCallError):
            read(pieces)
