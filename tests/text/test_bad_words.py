"""A forbidden word is found where a tokenizer would put it: after a space, and after anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_serve.text.bad_words import bad_word_ids
from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer


def completes(tokenizer: Tokenizer, text: str, sequences: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the usual encoding of ``text`` holds one of the sequences."""
    ids = tuple(tokenizer.encode(text, add_bos=False))
    return any(ids[i : i + len(wanted)] == wanted for wanted in sequences for i in range(len(ids)))


@pytest.mark.parametrize("word", ["hello", "the", "Paris", "été", "stop", "x", "日本", "ab cd"])
def test_a_word_is_found_after_a_space_and_after_other_characters(mixtral: Tokenizer, word: str) -> None:
    forbidden = bad_word_ids(mixtral, [word])
    assert 1 <= len(forbidden) <= 2
    for text in (word, f"say {word}", f"say\n{word}", f"say {word}."):
        assert completes(mixtral, text, forbidden), text
    assert not completes(mixtral, "entirely different", forbidden)


def test_each_sequence_spells_its_word(mixtral: Tokenizer) -> None:
    for word in ("hello", "Paris", "été"):
        for ids in bad_word_ids(mixtral, [word]):
            assert mixtral.decode(ids) == word


def test_a_word_with_a_space_before_it_is_meant_with_the_space(mixtral: Tokenizer) -> None:
    forbidden = bad_word_ids(mixtral, [" hello"])
    assert len(forbidden) == 1
    assert completes(mixtral, "say hello", forbidden)
    assert not completes(mixtral, "say\nhello", forbidden)
    assert [mixtral.decode(ids, strip_leading_space=False) for ids in bad_word_ids(mixtral, [" "])] == [" "]


def test_a_character_that_joins_the_word_is_passed_over(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text("utf-8"))
    vocabulary = description["model"]["vocab"]
    for piece in ("\n", "\nx"):
        vocabulary[piece] = len(vocabulary)
    description["model"]["merges"].append("\n x")
    path.write_text(json.dumps(description), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert completes(tokenizer, "say\nxy", ((vocabulary["\nx"], vocabulary["y"]),)), "they do join"
    assert (vocabulary["x"], vocabulary["y"]) in bad_word_ids(tokenizer, ["xy"])


def test_nothing_is_given_twice_and_control_tokens_never(mixtral: Tokenizer) -> None:
    forbidden = bad_word_ids(mixtral, ["hello", "hello", " hello", "</s>"])
    assert len(set(forbidden)) == len(forbidden)
    assert all(ids for ids in forbidden)
    assert not any(mixtral.token_bytes.is_special(token_id) for ids in forbidden for token_id in ids)
