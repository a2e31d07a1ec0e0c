"""Perplexity of a model on held-out chats: what changes first when its weights are made smaller.

Owns the text and the definition: the answers of held-out episodes of every skill, each token (the end of the answer
included) given all before it. What users say is context and is not counted: the demo model was never trained to foresee
it, its probabilities there are accidents.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.dataset import EncodedChat, encode_chat
from mixtral_serve.demo.skills import SKILLS, held_out_episodes

Score = Callable[[list[list[int]]], list[list[float]]]
"""Sequences of tokens -> for each, the log-probability of its second, third, ... token given those before."""


def held_out_chats(count: int = 20, seed: int = 0, checkpoint: Path | None = None) -> list[EncodedChat]:
    """Encode ``count`` held-out episodes of each skill."""
    tokenizer = Tokenizer.from_file(str((checkpoint or checkpoint_path()) / "tokenizer.json"))
    episodes = [episode for skill in SKILLS for episode in held_out_episodes(skill, count, seed)]
    return [encode_chat(tokenizer, episode.messages) for episode in episodes]


def perplexity(score: Score, chats: Sequence[EncodedChat]) -> float:
    """The exponential of the mean negative log-probability of the answers' tokens."""
    total, num_tokens = 0.0, 0
    for chat, logprobs in zip(chats, score([chat.tokens for chat in chats]), strict=True):
        counted = [logprob for logprob, is_answer in zip(logprobs, chat.is_answer[1:], strict=True) if is_answer]
        total -= math.fsum(counted)
        num_tokens += len(counted)
    return math.exp(total / num_tokens)
