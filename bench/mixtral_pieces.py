"""Mixtral's own vocabulary, as the ``mistral-common`` package carries it.

Owns: ``mixtral_token_bytes``.
"""

from __future__ import annotations

from importlib.resources import files

from sentencepiece import SentencePieceProcessor

from mixtral_serve.text.detokenizer import TokenBytes


def mixtral_token_bytes() -> TokenBytes:
    """The bytes of each of the 32,000 tokens."""
    model = SentencePieceProcessor(model_proto=files("mistral_common").joinpath("data/tokenizer.model.v1").read_bytes())
    ids = range(model.get_piece_size())
    special = [token_id for token_id in ids if model.is_control(token_id) or model.is_unknown(token_id)]
    return TokenBytes({token_id: _bytes_of(model, token_id) for token_id in ids}, special_ids=special)


def _bytes_of(model: SentencePieceProcessor, token_id: int) -> bytes:
    piece: str = model.id_to_piece(token_id)
    return bytes([int(piece[3:5], 16)]) if model.is_byte(token_id) else piece.replace("▁", " ").encode()
