"""The chat template of a checkpoint: a conversation in, token ids out.

Owns: ``ChatTemplate`` and ``load_chat_template``. The template is the one of the checkpoint that the operator
chose (``chat_template.jinja``, or the one inside ``tokenizer_config.json``), run in Jinja's immutable sandbox
with the same extensions, filters and functions that Transformers gives it. A template from a request is never
looked at.

Invariant: control tokens come from the template alone. Where a message spells a control string, the string is
replaced by a placeholder with a random part before rendering; the rendered text is split at the control
strings that are left; the placeholders become text again; each piece is encoded with control strings switched
off, on its own, as Mixtral's reference does.

Rejected: stripping or refusing such messages. People do talk about ``</s>``.
"""

from __future__ import annotations

import json
import re
import secrets
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixtral_serve.text.conversation import ChatMessage, arranged
from mixtral_serve.text.errors import ChatTemplateError, TokenizerError
from mixtral_serve.text.tokenizer import CONFIG_FILE, Tokenizer, read_json

TEMPLATE_FILE: Final = "chat_template.jinja"


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 (the shape that Jinja's extensions have)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Shield:
    """Hides control strings in what users wrote while the template runs."""

    def __init__(self, control: re.Pattern[str]) -> None:
        nonce = secrets.token_hex(8)
        self._control = control
        self._hidden: list[str] = []
        # Letters and digits only: the placeholder must pass trimming and JSON quoting unchanged.
        self._prefix = f"X{nonce}N"
        self._placeholder = re.compile(rf"X{nonce}N([0-9]+)X")

    def hide(self, text: str) -> str:
        return self._control.sub(self._hide, text)

    def reveal(self, text: str) -> str:
        if not self._hidden:
            return text
        return self._placeholder.sub(lambda match: self._hidden[int(match[1])], text)

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{self._prefix}{len(self._hidden) - 1}X"


class ChatTemplate:
    """Renders and encodes conversations. Immutable and safe to use from several threads."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Compile ``source``.

        Raises:
            jinja2.TemplateSyntaxError: it is not a Jinja template.
        """
        self._template = _environment().from_string(source)
        self._tokenizer = tokenizer
        self.system_role: Final = self._knows_system_role()

    def encode(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> array[int]:
        """Token ids of the conversation, ready for the model's answer.

        Raises:
            ChatTemplateError: the template refuses the conversation.
            ValueError: a message has lone surrogates.
        """
        shield = _Shield(self._tokenizer.control_pattern)
        hidden = [ChatMessage(message.role, shield.hide(message.content)) for message in messages]
        rendered = self._render(arranged(hidden, system_role=self.system_role), add_generation_prompt)
        ids = array("i")
        for piece in self._tokenizer.split_control(rendered):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids.extend(self._tokenizer.encode(shield.reveal(piece), add_bos=False))
        return ids

    def _render(self, messages: Sequence[ChatMessage], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokenizer.named_tokens,
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(str(error)) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError):
            # A template is a program: one that trips over a conversation refuses it, in its clumsy way.
            raise ChatTemplateError("the chat template cannot render this conversation") from None

    def _knows_system_role(self) -> bool:
        """Whether a system message reaches the rendered text; older Mixtral templates raise instead."""
        probe = "a probe of the system role"
        try:
            rendered = self._render([ChatMessage("system", probe), ChatMessage("user", "?")], True)
        except ChatTemplateError:
            return False
        return probe in rendered


def load_chat_template(checkpoint: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a checkpoint, or None where it has none (a base model).

    Raises:
        TokenizerError: a file is unreadable, or its template is not one.
    """
    path = checkpoint / TEMPLATE_FILE
    source: str | None
    if path.exists():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(path, f"cannot be read: {error}") from None
    else:
        path = checkpoint / CONFIG_FILE
        source = _default_template(path, read_json(path).get("chat_template"))
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(path, f"the chat template is not valid: {error}") from None


def _default_template(path: Path, value: object) -> str | None:
    """The template in a tokenizer's configuration: a string, or a list of named ones of which one is "default"."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return str(entry["template"])
    raise TokenizerError(path, "has a chat_template that is neither a template nor a list with a default one")
