"""Words that an answer must not hold, as the token sequences that would complete them.

Owns: ``bad_word_ids``.

A word has two usual encodings: after a space (the tokenizer's space is part of the word's first token) and after any
other character. Both are given; other ways to cut the same text into tokens exist for nearly every word and are not
enumerated, for there are exponentially many.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mixtral_serve.text.tokenizer import Tokenizer

_NEIGHBOURS: Final = ("\n", "\t", "\r", "\x7f")
"""Characters that a word may follow without a space. One that joins the word's token is passed over."""


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences that complete one of ``words``, none of them empty or twice.

    A word with a space before it is meant with that space only.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        spaced = word.removeprefix(" ")
        if spaced:
            # ``encode`` puts a space before what it is given.
            found[tuple(tokenizer.encode(spaced, add_bos=False))] = None
        if spaced == word or not spaced:
            found |= dict.fromkeys(_unspaced(tokenizer, word))
    return tuple(found)


def _unspaced(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """Ids of ``word`` right after another character; none where every character tried joins the word's first token."""
    for neighbour in _NEIGHBOURS:
        ids = tokenizer.encode(neighbour + word, add_bos=False)
        left = len(f" {neighbour}".encode())
        start = 0
        while left > 0:
            left -= len(tokenizer.token_bytes[ids[start]])
            start += 1
        if left == 0:
            return [tuple(ids[start:])]
    return []
