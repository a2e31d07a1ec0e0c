"""Tokenizers under test: Mixtral's own 32k vocabulary, and the tiny one."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
"""As Mixtral-8x7B-Instruct's first template: no system role."""


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces of a SentencePiece model file, and the slowest possible encoder over them."""

    pieces: tuple[tuple[str, float, bool], ...]
    """(piece, score, whether it is ordinary text)"""

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: index for index, (piece, _, _) in enumerate(self.pieces)}

    @cached_property
    def _scores(self) -> dict[str, float]:
        return {piece: score for piece, score, is_text in self.pieces if is_text}

    def encode(self, text: str) -> list[int]:
        """Merge the best-scored neighbours until none can be merged; spell the rest in bytes."""
        ids, scores = self._ids, self._scores
        symbols = list("▁" + text.replace(" ", "▁")) if text else []
        while True:
            pairs = [
                (scores[left + right], -place)
                for place, (left, right) in enumerate(pairwise(symbols))
                if left + right in scores
            ]
            if not pairs:
                break
            place = -max(pairs)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [
            token_id
            for symbol in symbols
            for token_id in (
                [ids[symbol]] if symbol in scores else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            )
        ]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: int | bytes
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size = 4
            if key & 7 == 2:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        yield key >> 3, value


@pytest.fixture(scope="session")
def sentencepiece_model() -> SentencePieceModel:
    """Mixtral's vocabulary, as the ``mistral-common`` package carries it."""
    data = files("mistral_common").joinpath("data/tokenizer.model.v1").read_bytes()
    pieces = []
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            text, score = piece[1], piece.get(2, bytes(4))
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            pieces.append((text.decode(), float(struct.unpack("<f", score)[0]), piece.get(3, 1) == 1))
    return SentencePieceModel(tuple(pieces))


@pytest.fixture(scope="session")
def mixtral_checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: SentencePieceModel) -> Path:
    """The tokenizer files of Mixtral-8x7B-Instruct, converted as the Hub's were."""
    vocab = {piece: index for index, (piece, _, _) in enumerate(sentencepiece_model.pieces)}
    merges: list[tuple[float, str, str]] = []
    for piece, score, _ in sentencepiece_model.pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, left, right) for left, right in known]
    merges.sort(key=lambda merge: -merge[0])
    controls = [
        {"id": index, "content": content, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for index, content in enumerate(("<unk>", "<s>", "</s>"))
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    description = {
        "version": "1.0",
        "added_tokens": controls,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INSTRUCT_TEMPLATE}
    directory = tmp_path_factory.mktemp("mixtral")
    (directory / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def mixtral(mixtral_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(mixtral_checkpoint)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)
