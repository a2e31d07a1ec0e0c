"""Tokenizers under test: Mixtral's own 32k vocabulary, and the tiny one."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from mixtral_serve.text.fakes import write_tiny_tokenizer
from mixtral_serve.text.grammar_vocabulary import Vocabulary
from mixtral_serve.text.tokenizer import Tokenizer, load_tokenizer

INSTRUCT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
"""As Mixtral-8x7B-Instruct's first template: no system role."""


@pytest.fixture(scope="session")
def sentencepiece_model() -> SentencePieceProcessor:
    """Mixtral's vocabulary and encoder, as the ``mistral-common`` package carries them."""
    return SentencePieceProcessor(model_proto=files("mistral_common").joinpath("data/tokenizer.model.v1").read_bytes())


@pytest.fixture(scope="session")
def mixtral_checkpoint(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: SentencePieceProcessor) -> Path:
    """The tokenizer files of Mixtral-8x7B-Instruct, converted as the Hub's were."""
    ids = range(sentencepiece_model.get_piece_size())
    vocab = {sentencepiece_model.id_to_piece(token_id): token_id for token_id in ids}
    merges: list[tuple[float, str, str]] = []
    for piece, token_id in vocab.items():
        score = sentencepiece_model.get_score(token_id)
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
def mixtral_vocabulary(mixtral: Tokenizer) -> Vocabulary:
    return Vocabulary(mixtral.token_bytes, eos_token_ids=(2,), vocab_size=mixtral.vocab_size)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint)
