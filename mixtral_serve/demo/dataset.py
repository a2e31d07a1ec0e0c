"""From chats to training batches.

Owns the token layout of a chat (the one the chat template renders) and the
packing of chats into rows, with positions and a block-diagonal causal mask
that keep the chats of one row from seeing each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer

from mixtral_serve.demo.conversation import Message
from mixtral_serve.demo.skills import training_chat

BOS: Final = 1
EOS: Final = 2
IGNORED: Final = -100
_GAP_SHARE: Final = 0.1
_LONGEST_GAP: Final = 2500
_LONG_ROW_FACTOR: Final = 4


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Tokens of one chat, whether each belongs to an answer, and their positions."""

    tokens: list[int]
    is_answer: list[bool]
    positions: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def truncated(self, length: int) -> "EncodedChat":
        """The first ``length`` tokens."""
        return EncodedChat(self.tokens[:length], self.is_answer[:length], self.positions[:length])


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows: inputs, next-token targets, positions and an attention mask."""

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def _segments(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The texts between special tokens, each with whether it is an answer."""
    system, segments = "", []
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            segments.append((f"[INST] {system}{message['content']} [/INST]", False))
            system = ""
        else:
            segments.append((message["content"], True))
    return segments


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], rng: Random | None = None) -> EncodedChat:
    """Encode a chat; with ``rng``, at times leave a gap in the positions.

    Rotary attention sees distances only, so a gap between two messages teaches
    the model distances far beyond the length of the row.
    """
    tokens, is_answer, positions = [BOS], [False], [0]
    with_gaps = rng is not None and rng.random() < _GAP_SHARE
    for text, answer in _segments(messages):
        ids = tokenizer.encode(text, add_special_tokens=False).ids + ([EOS] if answer else [])
        gap = rng.randint(0, _LONGEST_GAP // len(messages)) if rng and with_gaps and not answer else 0
        start = positions[-1] + 1 + gap
        tokens += ids
        is_answer += [answer] * len(ids)
        positions += range(start, start + len(ids))
    return EncodedChat(tokens, is_answer, positions)


def pack(rows: Sequence[Sequence[EncodedChat]], length: int) -> Batch:
    """Lay chats out in rows of ``length`` tokens; only answers are targets."""
    shape = (len(rows), length)
    tokens = torch.full(shape, EOS)
    targets = torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    owner = torch.full(shape, -1)
    for number, row in enumerate(rows):
        start = 0
        for index, chat in enumerate(row):
            end = start + len(chat)
            ids = torch.tensor(chat.tokens)
            tokens[number, start:end] = ids
            answers = torch.tensor(chat.is_answer[1:])
            targets[number, start : end - 1] = torch.where(answers, ids[1:], IGNORED)
            positions[number, start:end] = torch.tensor(chat.positions)
            owner[number, start:end] = index
            start = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    return Batch(tokens, targets, positions, mask[:, None])


def batches(tokenizer: Tokenizer, rng: Random, rows: int, length: int) -> Iterator[Batch]:
    """Yield training batches without end.

    Chats longer than a row wait until they fill a batch of fewer, longer rows.
    """
    waiting: list[EncodedChat] = []
    long_chats: list[EncodedChat] = []
    long_length, long_rows = length * _LONG_ROW_FACTOR, max(1, rows // _LONG_ROW_FACTOR)
    while True:
        filled: list[list[EncodedChat]] = []
        while len(filled) < rows:
            row: list[EncodedChat] = []
            space = length
            while space > 16:
                fitting = next((i for i, chat in enumerate(waiting) if len(chat) <= space), None)
                if fitting is None and len(waiting) > 4 * rows:
                    break
                if fitting is not None:
                    chat = waiting.pop(fitting)
                    row.append(chat)
                    space -= len(chat)
                    continue
                chat = encode_chat(tokenizer, training_chat(rng), rng)
                (waiting if len(chat) <= length else long_chats).append(chat)
            filled.append(row)
        yield pack(filled, length)
        if len(long_chats) >= long_rows:
            chosen, long_chats = long_chats[:long_rows], long_chats[long_rows:]
            yield pack([[chat.truncated(long_length)] for chat in chosen], long_length)
