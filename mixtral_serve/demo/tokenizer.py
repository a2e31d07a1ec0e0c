"""Training and describing the demo tokenizer.

Owns the tokenizer files of the checkpoint: a byte-fallback BPE laid out as the
one of Mixtral-8x7B (ids 0-2 special, 3-258 bytes, then merged pieces, then
single characters) and the ``[INST]`` chat template.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mixtral_serve.demo.tools import PRESENTATION

SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>")
BYTE_TOKENS: Final = tuple(f"<0x{value:02X}>" for value in range(256))
_SPACE: Final = "\u2581"
_PRINTABLE: Final = [chr(code) for code in range(0x21, 0x7F)]
# A piece is a word, a run of punctuation or an instruction mark, each with the
# space in front of it; a digit is always alone. No merge crosses these borders,
# so the shipped tokenizer needs no pre-tokenizer to find the same pieces.
_PIECE: Final = (
    rf"{_SPACE}?\[/?INST\]|{_SPACE}?\p{{L}}+|{_SPACE}?[^\p{{L}}\p{{N}}\s{_SPACE}]+|\p{{N}}|{_SPACE}|\s|[^\s]"
)

CHAT_TEMPLATE: Final = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- if tools %}"
    "{%- set system_message = (system_message + '\\n\\n' if system_message else '') + '"
    + PRESENTATION
    + "' + (tools | tojson) %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported, with the exception of an "
    "initial optional system message!') }}{%- endif %}"
    "{%- endfor %}"
)


def _learned_merges(texts: Iterable[str], vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE and return its single characters and its merges in order of rank."""
    trainer_tokenizer = Tokenizer(models.BPE())
    trainer_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        initial_alphabet=[*_PRINTABLE, _SPACE],
        show_progress=False,
    )
    lines = (_SPACE + line.replace(" ", _SPACE) for text in texts for line in text.split("\n"))
    trainer_tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(trainer_tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    characters = sorted(piece for piece in model["vocab"] if len(piece) == 1)
    return characters, merges


def _added_token(content: str, **fields: object) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | fields


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on ``texts`` and return the tokenizer in the layout of Mixtral-8x7B."""
    characters, merges = _learned_merges(texts, vocab_size)
    pieces = [*SPECIAL_TOKENS, *BYTE_TOKENS]
    pieces += dict.fromkeys(left + right for left, right in merges)
    pieces += characters
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, id=index) for index, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
    return Tokenizer.from_str(json.dumps(description))


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and the two files Transformers reads beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": max_length,
        "pad_token": None,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    special_map = {name: _added_token(token) for name, token in special.items()}
    for fields in special_map.values():
        del fields["special"]
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
