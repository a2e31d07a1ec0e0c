"""From token ids to text, one token at a time, without ever cutting a character in two.

Owns: ``TokenBytes``, the immutable id -> bytes table of a tokenizer, and ``IncrementalDetokenizer``, the state
of one request's text.

Invariant: what ``push`` and ``flush`` return, joined, equals the bytes of all the tokens joined and decoded
once (invalid sequences as U+FFFD), less one leading space where that was asked for. So the text does not
depend on how the tokens were grouped into steps.

Rejected: decoding the last few ids twice and comparing, as libraries do whose decoder is a black box. It
costs two decodes per token and prints U+FFFD when a character spans more tokens than the window.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from typing import Final

_new_utf8_decoder: Final = codecs.getincrementaldecoder("utf-8")


class TokenBytes:
    """The bytes that each token id stands for. Immutable; shared by all requests."""

    __slots__ = ("_pieces", "_special", "max_bytes")

    def __init__(self, pieces: Mapping[int, bytes], special_ids: Iterable[int] = ()) -> None:
        """``pieces`` maps ids to bytes; ids it leaves out (a padded head has such) have no bytes."""
        size = max(pieces, default=-1) + 1
        self._pieces: Final = tuple(pieces.get(token_id, b"") for token_id in range(size))
        self._special: Final = frozenset(special_ids)
        ordinary = (len(piece) for token_id, piece in pieces.items() if token_id not in self._special)
        self.max_bytes: Final = max(ordinary, default=1)
        """Length of the longest ordinary token: no text of ``b`` bytes has fewer than ``b / max_bytes`` tokens."""

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of the token; empty for ids from ``len(self)`` on, which a padded head may sample."""
        assert token_id >= 0, "a negative id would silently read the table from its end"
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token such as the end of sequence."""
        return token_id in self._special


class IncrementalDetokenizer:
    """The text of one request, token by token."""

    __slots__ = ("_at_start", "_decoder", "_skip_special_tokens", "_table")

    def __init__(
        self, table: TokenBytes, *, skip_special_tokens: bool = True, strip_leading_space: bool = False
    ) -> None:
        """With ``strip_leading_space`` one space at the very start of the text is dropped: a chat answer is a
        fresh piece and its first token carries the piece's space; a completion goes on where the prompt ended.
        """
        self._table = table
        self._skip_special_tokens = skip_special_tokens
        self._at_start = strip_leading_space
        self._decoder = _new_utf8_decoder("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; an unfinished character is held back."""
        if self._skip_special_tokens and self._table.is_special(token_id):
            return ""
        return self._started(self._decoder.decode(self._table[token_id]))

    def flush(self) -> str:
        """What is still held back, at the end of the text: an unfinished character as U+FFFD."""
        return self._started(self._decoder.decode(b"", final=True))

    def _started(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text
