"""Which chat format a server speaks.

Owns: ``ChatEncoder``, what every format can do, and ``load_chat_format``, the choice. The operator chooses once, at
start-up; a request never does:

* ``mixtral``: Mixtral's own format (``instruct``);
* ``checkpoint``: the template that the checkpoint carries, in the sandbox;
* a path: the template in that file, in the sandbox;
* ``auto``: Mixtral's own format where the checkpoint's template is nothing but an attempt at it, the checkpoint's
  template where it is something else, and no chat where there is none (a base model).

A template is an attempt at Mixtral's format if it writes a small conversation like it, white space aside, and does
nothing with ``tools``. The published templates of Mixtral-8x7B-Instruct are such: what they do differently are faults
(see the header of ``instruct``). The bundled model's template presents tools as it was trained, so it stays.

Rejected: looking at the model's name or the template's hash. Fine-tunes keep the one and vary the other.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from mixtral_serve.text.chat_template import ChatTemplate, load_chat_template, read_chat_template
from mixtral_serve.text.conversation import ChatMessage
from mixtral_serve.text.errors import ChatTemplateError, TokenizerError
from mixtral_serve.text.instruct import MixtralInstruct
from mixtral_serve.text.tokenizer import CONFIG_FILE, Tokenizer

AUTO: Final = "auto"
MIXTRAL: Final = "mixtral"
CHECKPOINT: Final = "checkpoint"
_PROBE: Final = (ChatMessage("user", "one"), ChatMessage("assistant", "two"), ChatMessage("user", "three"))
_BLANK: Final = re.compile(r"\s+")


class ChatEncoder(Protocol):
    """Turns conversations into token ids. Immutable and safe to use from several threads."""

    @property
    def description(self) -> str:
        """What it is, for the operator."""
        ...

    def encode(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> array[int]:
        """See ``ChatTemplate.encode``."""
        ...


def load_chat_format(
    checkpoint: Path, tokenizer: Tokenizer, *, choice: str = AUTO, strict: bool = False
) -> ChatEncoder | None:
    """The format of the operator's choice; None where ``auto`` finds a base model.

    With ``strict``, conversations that the format does not allow are refused instead of repaired.

    Raises:
        TokenizerError: a template is unreadable or invalid, or what was chosen is not there.
    """
    if choice == MIXTRAL:
        return _instruct(checkpoint, tokenizer, strict)
    if choice not in (AUTO, CHECKPOINT):
        return read_chat_template(Path(choice), tokenizer, strict=strict)
    template = load_chat_template(checkpoint, tokenizer, strict=strict)
    if template is None and choice == CHECKPOINT:
        raise TokenizerError(checkpoint / CONFIG_FILE, "has no chat_template, which was asked for")
    if template is not None and choice == AUTO and _is_mixtrals(template, tokenizer):
        return _instruct(checkpoint, tokenizer, strict)
    return template


def _instruct(checkpoint: Path, tokenizer: Tokenizer, strict: bool) -> MixtralInstruct:
    try:
        return MixtralInstruct(tokenizer, strict=strict)
    except ChatTemplateError as error:
        raise TokenizerError(checkpoint / CONFIG_FILE, str(error)) from None


def _is_mixtrals(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a template writes Mixtral's format and nothing else. ``[INST]`` must be text, as in version 1."""
    bos, eos = (tokenizer.named_tokens.get(name) for name in ("bos_token", "eos_token"))
    if template.knows_tools or bos is None or tokenizer.control_pattern.fullmatch("[INST]"):
        return False
    try:
        rendered = template.render(_PROBE)
    except ChatTemplateError:
        return False
    return _BLANK.sub("", rendered) == f"{bos}[INST]one[/INST]two{eos}[INST]three[/INST]"
