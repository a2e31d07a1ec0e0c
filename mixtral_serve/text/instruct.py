"""Mixtral's own ``[INST]`` format, without a template: a conversation in, token ids out.

Owns: ``MixtralInstruct`` and ``repaired``. The format is version 1 of Mistral's instruct tokenizers, and where their
reference (the ``mistral-common`` package) has an answer, the ids are the same:

* the beginning-of-sequence token, then the turns; each turn is encoded on its own, as one piece of text;
* a user's turn is ``[INST] `` + content + `` [/INST]``, an assistant's turn its content and end-of-sequence;
* all system messages, wherever they stand, are joined and stand before the first user's content;
* neighbours of the same role are one turn. What is joined is joined by a blank line, and empty contents by nothing.
  A system message between two users' messages keeps them apart: both are turns;
* a conversation whose first turn is the assistant's gets an empty user turn before it.

What the reference refuses is first rewritten into what it takes (``repaired``), or refused in strict mode.

Invariant: ``[INST]`` and all that people wrote is text: the only control tokens are those that stand in this file.

Rejected: the templates that checkpoints carry. They put a space too many before ``[INST]`` or none before the answer,
which are other tokens than the model was trained on, and refuse every conversation that does not alternate.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Final

from mixtral_serve.text.conversation import BLANK_LINE, NOTHING_TO_CONTINUE, ChatMessage, Role
from mixtral_serve.text.errors import ChatTemplateError
from mixtral_serve.text.tokenizer import Tokenizer
from mixtral_serve.text.tool_text import with_tools

_EMPTY: Final = "an assistant message has no content"
_LATE_SYSTEM: Final = "a system message follows an assistant message"
_LAST: Final = "the last message is the assistant's"


class MixtralInstruct:
    """Encodes conversations in Mixtral's format. Immutable and safe to use from several threads."""

    description: Final = "Mixtral's own format"

    def __init__(self, tokenizer: Tokenizer, *, strict: bool = False) -> None:
        """With ``strict`` a conversation that the reference refuses is refused; otherwise it is repaired.

        Raises:
            ChatTemplateError: the vocabulary has no beginning or no end of sequence.
        """
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise ChatTemplateError("Mixtral's format needs a tokenizer with bos_token and eos_token")
        self._tokenizer = tokenizer
        self._bos: Final = tokenizer.bos_token_id
        self._eos: Final = tokenizer.eos_token_id
        self._strict: Final = strict

    def encode(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> array[int]:
        """Token ids of the conversation. The arguments mean the same as for ``ChatTemplate.encode``.

        Raises:
            ChatTemplateError: strict, and the reference refuses the conversation; or nothing can be continued.
            ValueError: a message has lone surrogates.
        """
        if continue_final_message and (not messages or messages[-1].role != "assistant"):
            raise ChatTemplateError(NOTHING_TO_CONTINUE)
        plain = with_tools(messages, tools)
        if self._strict:
            _check(plain, continue_final_message=continue_final_message, open_end=not add_generation_prompt)
        else:
            plain = repaired(plain, add_generation_prompt and not continue_final_message)
        ids = array("i", [self._bos])
        turns = _turns(plain)
        for index, (role, content) in enumerate(turns):
            if role == "user":
                ids.extend(self._tokenizer.encode(f"[INST] {content} [/INST]", add_bos=False))
                continue
            if content:
                ids.extend(self._tokenizer.encode(content, add_bos=False))
            if not (continue_final_message and index == len(turns) - 1):
                ids.append(self._eos)
        return ids


def repaired(messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> list[ChatMessage]:
    """``messages``, or the nearest conversation that the reference takes.

    An assistant message without content is left out; a system message after an assistant's speaks with the user's
    voice where it stands; where the model is to answer, an empty message of the user comes after a last one of the
    assistant, and is all that is left of a conversation without content.
    """
    kept: list[ChatMessage] = []
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content:
            if not add_generation_prompt and index == len(messages) - 1:
                kept.append(message)  # an answer that is to be continued from its very start
            continue
        is_late = message.role == "system" and bool(kept) and kept[-1].role == "assistant"
        kept.append(ChatMessage("user", message.content) if is_late else message)
    if add_generation_prompt and (not kept or kept[-1].role == "assistant"):
        kept.append(ChatMessage("user", ""))
    return kept


def _check(messages: Sequence[ChatMessage], *, continue_final_message: bool, open_end: bool) -> None:
    """Raise for what the reference refuses."""
    before: Role | None = None
    for message in messages:
        if message.role == "assistant" and not message.content:
            raise ChatTemplateError(_EMPTY)
        if message.role == "system" and before == "assistant":
            raise ChatTemplateError(_LATE_SYSTEM)
        before = message.role
    if before == "assistant" and not (continue_final_message or open_end):
        raise ChatTemplateError(_LAST)


def _turns(messages: Sequence[ChatMessage]) -> list[tuple[Role, str]]:
    """The turns of a conversation that the reference takes: user or assistant, and the text of each."""
    turns: list[tuple[Role, list[str]]] = []
    before: Role | None = None
    for message in messages:
        if message.role != "system":
            if message.role != before:
                turns.append((message.role, []))
            turns[-1][1].append(message.content)
        before = message.role
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", [""]))
    joined = [(role, BLANK_LINE.join(filter(None, contents))) for role, contents in turns]
    system = BLANK_LINE.join(filter(None, (m.content for m in messages if m.role == "system")))
    if system:
        # Also before an empty content: there the reference ends with the blank line.
        joined[0] = ("user", system + BLANK_LINE + joined[0][1])
    return joined
