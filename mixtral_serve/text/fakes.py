"""A tiny tokenizer of Mixtral's kind, for tests and demonstrations.

Owns: ``write_tiny_tokenizer``, which writes a checkpoint's tokenizer files: 3 control tokens, 256 byte tokens,
a few dozen merged pieces and characters, and a chat template with ``[INST]``. It goes through ``load_tokenizer``
like any other, so that what is tested with it is the real thing, only small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

CONTROL_TOKENS: Final = ("<unk>", "<s>", "</s>")
WORDS: Final = ("the", "and", "hello", "world", "stop", "INST")

TINY_CHAT_TEMPLATE: Final = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
    "{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for turn in turns %}"
    "{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}"
    "{%- endif %}"
    "{%- if turn.role == 'user' %}"
    "{{- '[INST] ' + (system if loop.first else '') + turn.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + turn.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)


def write_tiny_tokenizer(directory: Path, *, chat_template: str | None = TINY_CHAT_TEMPLATE) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``directory``, which exists."""
    pieces = [*CONTROL_TOKENS, *(f"<0x{value:02X}>" for value in range(256))]
    merges: list[str] = []
    for word in WORDS:
        left = "▁" if word.islower() else word[0]
        for character in word if word.islower() else word[1:]:
            merges.append(f"{left} {character}")
            left += character
            pieces.append(left)
    pieces += ["▁", *(chr(code) for code in range(0x21, 0x7F))]
    description = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": content, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for index, content in enumerate(CONTROL_TOKENS)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
            "merges": list(dict.fromkeys(merges)),
        },
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": chat_template}
    (directory / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
