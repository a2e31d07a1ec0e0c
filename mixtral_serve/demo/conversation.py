"""Conversations, the unit of the demo corpus.

Owns the message and episode types that every skill produces, the rule that
keeps held-out material out of training, and the small variations of wording
(capitals, punctuation, courtesy) that all skills share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Final, Literal, TypedDict

Role = Literal["system", "user", "assistant"]

HELD_OUT_SHARE: Final = 0.1


class Message(TypedDict):
    """One chat message."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Episode:
    """One exercise of one skill: the messages, ending with the expected answer.

    ``key`` names what is new about the episode (two operands, a word list, a
    fact together with its phrasing); the training split is decided on it alone.
    """

    skill: str
    key: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the expected answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The expected answer."""
        return self.messages[-1]["content"]


def is_held_out(key: str) -> bool:
    """Say whether episodes with this key are kept for the evaluation."""
    digest = blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def dialogue(*turns: str, system: str | None = None) -> tuple[Message, ...]:
    """Build messages from turns that alternate user, assistant, user, ..."""
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for index, content in enumerate(turns):
        messages.append({"role": "assistant" if index % 2 else "user", "content": content})
    return tuple(messages)


def punctuated(rng: Random, text: str) -> str:
    """Vary the first capital and the final punctuation of a request."""
    draw = rng.random()
    if draw < 0.12:
        return text[:1].lower() + text[1:]
    if draw < 0.22:
        return text.rstrip(".?!")
    if draw < 0.26:
        return text.rstrip(".?!") + rng.choice(("!", "??", " ?", "...", " please"))
    return text


def casual(rng: Random, text: str) -> str:
    """Vary a request whose answer does not depend on its capitals."""
    draw = rng.random()
    if draw < 0.10:
        return punctuated(rng, text.lower())
    if draw < 0.12:
        return text.upper()
    if draw < 0.20:
        opener = rng.choice(
            ("Please tell me: ", "Hey, ", "Tell me, ", "I have a question. ", "OK, ", "So, ", "Quick question: ")
        )
        return punctuated(rng, opener + text)
    return punctuated(rng, text)


def joined(words: Sequence[str]) -> str:
    """Join words as in a sentence: ``a, b and c``."""
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + " and " + words[-1]


_ADJECTIVES: Final = (
    "helpful",
    "kind",
    "friendly",
    "polite",
    "careful",
    "brief",
    "honest",
    "concise",
    "cheerful",
    "precise",
    "patient",
    "clever",
)
_ROLES: Final = ("assistant", "chatbot", "teacher", "guide", "friend", "AI", "language model", "helper", "librarian")
_RULES: Final = (
    "Answer briefly.",
    "Answer the question.",
    "Keep your answers short.",
    "Do not make things up.",
    "Always tell the truth.",
    "Be polite.",
    "Help the user.",
    "Follow the instructions of the user.",
    "Reply in English.",
    "Answer in one sentence.",
    "Give only the answer.",
    "Think carefully.",
)
DEFAULT_SYSTEM: Final = "You are a helpful assistant."


def system_message(rng: Random, held_out: bool = False) -> str:
    """Compose a system message; the held-out ones never occur in training."""
    while True:
        adjective = rng.choice(_ADJECTIVES)
        if rng.random() < 0.2:
            adjective += f" and {rng.choice(_ADJECTIVES)}"
        article = "an" if adjective.startswith(("a", "e", "i", "o", "u", "honest")) else "a"
        parts = [f"You are {article} {adjective} {rng.choice(_ROLES)}."]
        parts += rng.sample(_RULES, rng.choice((0, 0, 1, 1, 2)))
        text = " ".join(parts[1:] if len(parts) > 1 and rng.random() < 0.2 else parts)
        if text != DEFAULT_SYSTEM and is_held_out("system " + text) == held_out:
            return text
