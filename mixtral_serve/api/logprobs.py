"""How log-probabilities are spelled: the forms of chat answers, of text completions, and vLLM's for prompts.

Owns: ``TokenNames``, ``TextOffsets`` and the three spellings.

Rules. JSON has no minus infinity: -9999 stands for it, as OpenAI says it. A text completion names tokens by their
text, in an object whose keys must differ: a token that is no whole character is ``bytes:\\xNN``, and of two tokens with
the same text the one that was not chosen is ``token_id:N``. So the chosen token is always there under its own name, and
the largest value is always that of the likeliest token: evaluation harnesses read both.

What is told of one token is JSON as soon as it is spelled: as Python's objects it would weigh four times as much, and
an answer can have tens of thousands of tokens with twenty alternatives each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from mixtral_serve.text.detokenizer import IncrementalDetokenizer, TokenBytes
from scheduler.events import TokenLogprob

_MIN_LOGPROB: Final = -9999.0
_encode: Final = msgspec.json.Encoder().encode


class TokenNames:
    """Spells tokens for people and harnesses."""

    __slots__ = ("_as_ids", "table")

    def __init__(self, table: TokenBytes, *, as_ids: bool = False) -> None:
        """With ``as_ids`` every token is called ``token_id:N``."""
        self.table: Final = table
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        """The token's characters, U+FFFD for what is none; its id where ids are wanted."""
        return _by_id(token_id) if self._as_ids else _characters(self.table[token_id])

    def name(self, token_id: int) -> str:
        """As ``text``, but bytes that are no characters are shown as bytes."""
        if self._as_ids:
            return _by_id(token_id)
        piece = self.table[token_id]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class TextOffsets:
    """Where tokens begin in the text that they make, in characters."""

    __slots__ = ("_detokenizer", "_offset")

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        """``detokenizer`` is fresh, and set up as the text's own."""
        self._detokenizer = detokenizer
        self._offset = 0

    def next(self, token_id: int) -> int:
        """The offset of the next token. Bytes of one character share the character's."""
        offset = self._offset
        self._offset += len(self._detokenizer.push(token_id))
        return offset


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> dict[str, object]:
    """The ``logprobs`` of a chat choice."""
    return {"content": chat_content(names, entries), "refusal": None}


def chat_content(names: TokenNames, entries: Sequence[TokenLogprob]) -> list[msgspec.Raw]:
    """One object per token."""
    return [
        _spelled(
            _chat_token(names, entry.token_id, entry.logprob)
            | {"top_logprobs": [_chat_token(names, token_id, logprob) for token_id, logprob in entry.top]}
        )
        for entry in entries
    ]


def completion_logprobs(
    names: TokenNames,
    offsets: TextOffsets,
    entries: Sequence[TokenLogprob],
    *,
    num_top: int,
    first: int | None = None,
) -> dict[str, object]:
    """The ``logprobs`` of a text completion. ``first`` is a prompt's first token, which nothing predicts: null."""
    head = [] if first is None else [first]
    ids = [*head, *(entry.token_id for entry in entries)]
    return {
        "tokens": [names.name(token_id) for token_id in ids],
        "token_logprobs": [*(None for _ in head), *(_finite(entry.logprob) for entry in entries)],
        "top_logprobs": [*(None for _ in head), *(_spelled(_top(names, entry, num_top)) for entry in entries)],
        "text_offset": [offsets.next(token_id) for token_id in ids],
    }


def prompt_logprobs(names: TokenNames, entries: Sequence[TokenLogprob], *, num_top: int) -> list[object]:
    """vLLM's ``prompt_logprobs``: null for the first token, then the token and the likeliest at its position by id.

    ``rank`` counts from 1; null for a token that is not among the likeliest.
    """
    return [None, *(_spelled(_ranked(names, entry, num_top)) for entry in entries)]


def _spelled(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": names.text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(names.table[token_id]),
    }


def _top(names: TokenNames, entry: TokenLogprob, num_top: int) -> dict[str, float]:
    chosen = names.name(entry.token_id)
    found: dict[str, float] = {}
    for token_id, logprob in entry.top[:num_top]:
        name = names.name(token_id)
        if token_id != entry.token_id and (name in found or name == chosen):
            name = _by_id(token_id)
        found[name] = _finite(logprob)
    found.setdefault(chosen, _finite(entry.logprob))
    return found


def _ranked(names: TokenNames, entry: TokenLogprob, num_top: int) -> dict[str, object]:
    ranks: dict[int, tuple[float, int | None]] = {
        token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)
    }
    ranks.setdefault(entry.token_id, (entry.logprob, None))
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": _characters(names.table[token_id])}
        for token_id, (logprob, rank) in ranks.items()
    }


def _characters(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
