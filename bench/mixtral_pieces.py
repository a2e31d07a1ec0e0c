"""Mixtral's own vocabulary, as the ``mistral-common`` package carries it.

Owns: ``mixtral_token_bytes``. The file is a SentencePiece model, a protocol buffer: field 1, repeated, is a piece;
within a piece field 1 is its text and field 3 its kind. Nothing else of it is needed, so nothing else is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Final

from mixtral_serve.text.detokenizer import TokenBytes

_PIECE: Final = 1
_TEXT: Final = 1
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
_CONTROLS: Final = (0, 1, 2)
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


def mixtral_token_bytes() -> TokenBytes:
    """The bytes of each of the 32,000 tokens."""
    data = files("mistral_common").joinpath("data/tokenizer.model.v1").read_bytes()
    texts = [dict(_fields(piece))[_TEXT].decode() for number, piece in _fields(data) if number == _PIECE]
    pieces = {token_id: _bytes_of(text) for token_id, text in enumerate(texts)}
    return TokenBytes(pieces, special_ids=_CONTROLS)


def _bytes_of(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of a message's fields; numbers as bytes of no content."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, size = key & 7, 0
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _DELIMITED:
            size, at = _varint(data, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}[kind]
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
