from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.text.detokenizer import IncrementalDetokenizer, TokenBytes

BYTES = TokenBytes({0: b"<s>"} | {1 + byte: bytes([byte]) for byte in range(256)}, special_ids=[0])


def byte_ids(data: bytes) -> list[int]:
    return [1 + byte for byte in data]


def pushed(ids: list[int], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(BYTES, **options)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.text())
def test_row69_a_character_comes_out_whole_and_no_earlier(text: str) -> None:
    pieces = pushed(byte_ids(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert pieces[-1] == ""


@given(st.binary())
def test_pieces_joined_are_the_bytes_decoded_once(data: bytes) -> None:
    assert "".join(pushed(byte_ids(data))) == data.decode("utf-8", "replace")


@given(st.lists(st.binary(max_size=6)), st.data())
def test_row69_the_text_does_not_depend_on_how_bytes_are_split_into_tokens(
    tokens: list[bytes], data: st.DataObject
) -> None:
    table = TokenBytes(dict(enumerate(tokens)))
    order = data.draw(st.permutations(range(len(tokens))))
    detokenizer = IncrementalDetokenizer(table)
    text = "".join([detokenizer.push(token_id) for token_id in order]) + detokenizer.flush()
    assert text == b"".join(tokens[token_id] for token_id in order).decode("utf-8", "replace")


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    assert pushed(byte_ids("é".encode()[:1])) == ["", "�"]


def test_special_tokens_are_left_out_or_shown() -> None:
    assert "".join(pushed([0, *byte_ids(b"a"), 0])) == "a"
    assert "".join(pushed([0, *byte_ids(b"a")], skip_special_tokens=False)) == "<s>a"


def test_a_skipped_special_token_does_not_break_a_character() -> None:
    first, second = byte_ids("é".encode())
    assert pushed([first, 0, second]) == ["", "", "é", ""]


@pytest.mark.parametrize(
    ("text", "expected"), [(" a", "a"), ("  a", " a"), ("a b", "a b"), ("", ""), (" ", ""), ("\n a", "\n a")]
)
def test_one_leading_space_is_dropped_where_asked(text: str, expected: str) -> None:
    assert "".join(pushed(byte_ids(text.encode()), strip_leading_space=True)) == expected
    assert "".join(pushed(byte_ids(text.encode()))) == text


def test_a_token_of_several_spaces_loses_one() -> None:
    detokenizer = IncrementalDetokenizer(TokenBytes({0: b"  ", 1: b" a"}), strip_leading_space=True)
    assert [detokenizer.push(0), detokenizer.push(1)] == [" ", " a"]


def test_the_table_answers_for_the_ids_of_a_padded_head() -> None:
    table = TokenBytes({0: b"a", 3: b"bcd"}, special_ids=[3])
    assert (len(table), table[1], table[3], table[99]) == (4, b"", b"bcd", b"")
    assert [table.is_special(token_id) for token_id in (0, 3, 99)] == [False, True, False]
    assert table.max_bytes == 1
