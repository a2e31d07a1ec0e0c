"""Chat templates: a conversation in, token ids out.

Owns: ``ChatTemplate`` and the two ways to get one: from a file that the operator named, or from the checkpoint
(``chat_template.jinja``, or the one inside ``tokenizer_config.json``). It runs in Jinja's immutable sandbox with the
same extensions, filters and functions that Transformers gives it, and its output is bounded. A template from a
request is never looked at. Which one is used, or none, is decided in ``chat_format``.

Invariant: control tokens come from the template alone. Where a message spells a control string, the string is
replaced by a placeholder with a random part before rendering; the rendered text is split at the control
strings that are left; the placeholders become text again; each piece is encoded with control strings switched
off, on its own, as Mixtral's reference does.

Rejected: stripping or refusing such messages. People do talk about ``</s>``. A time limit for a template: only another
process could enforce it, and the operator, who chose the template, is trusted.
"""

from __future__ import annotations

import json
import re
import secrets
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixtral_serve.text.conversation import NOTHING_TO_CONTINUE, ChatMessage, arranged
from mixtral_serve.text.errors import ChatTemplateError, TokenizerError
from mixtral_serve.text.tokenizer import CONFIG_FILE, Tokenizer, read_json
from mixtral_serve.text.tool_text import with_tools

TEMPLATE_FILE: Final = "chat_template.jinja"
MAX_RENDERED_CHARS: Final = 16_000_000
"""Far more than any body brings in: a template that makes more of a conversation has run wild."""


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
        self.end: Final = f"X{nonce}E"
        """Marks where a message ends."""

    def hide(self, text: str) -> str:
        return self._control.sub(self._hide, text)

    def reveal(self, text: str) -> str:
        if not self._hidden:
            return text
        return self._placeholder.sub(lambda match: self._hidden[int(match[1])], text)

    def hide_all(self, value: object) -> object:
        """``value``, JSON, with each of its strings and keys hidden."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(item) for item in value]
        return value

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match.group())
        return f"{self._prefix}{len(self._hidden) - 1}X"


class ChatTemplate:
    """Renders and encodes conversations. Immutable and safe to use from several threads."""

    description: Final = "a chat template"

    def __init__(self, source: str, tokenizer: Tokenizer, *, strict: bool = False) -> None:
        """Compile ``source``. With ``strict`` it gets the messages as they are, and refuses what it does not like;
        otherwise they are arranged as it wants them.

        Raises:
            jinja2.TemplateSyntaxError: it is not a Jinja template.
        """
        self._template = _environment().from_string(source)
        self._tokenizer = tokenizer
        self._strict: Final = strict
        self.system_role: Final = self._shows_probe(system=True)
        self.knows_tools: Final = self._shows_probe(system=False)

    def encode(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> array[int]:
        """Token ids of the conversation, ready for the model's answer.

        ``tools`` are definitions of functions: the template's business where it knows ``tools``, and text in the
        system message (``tool_text``) where it does not. Without ``add_generation_prompt`` nothing invites an answer.
        With ``continue_final_message`` the last message is the assistant's and stays open: the model goes on with it.

        Raises:
            ChatTemplateError: the template refuses the conversation, or nothing can be continued.
            ValueError: a message has lone surrogates.
        """
        if continue_final_message and (not messages or messages[-1].role != "assistant"):
            raise ChatTemplateError(NOTHING_TO_CONTINUE)
        shield = _Shield(self._tokenizer.control_pattern)
        plain = with_tools(messages, () if self.knows_tools else tools)
        if continue_final_message:
            plain[-1] = ChatMessage("assistant", plain[-1].content + shield.end)
        hidden = [ChatMessage(message.role, shield.hide(message.content)) for message in plain]
        if not self._strict:
            hidden = arranged(hidden, system_role=self.system_role)
        known = [shield.hide_all(tool) for tool in tools] if self.knows_tools else []
        rendered = self._render(hidden, known, add_generation_prompt and not continue_final_message)
        if continue_final_message:
            rendered, end, _ = rendered.rpartition(shield.end)
            if not end:
                raise ChatTemplateError("the chat template does not show the final message as it is")
        ids = array("i")
        for piece in self._tokenizer.split_control(rendered):
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                ids.extend(self._tokenizer.encode(shield.reveal(piece), add_bos=False))
        return ids

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a conversation, control tokens as their strings: for looking at a template, not for a model.

        Raises:
            ChatTemplateError: the template refuses the conversation.
        """
        return self._render(messages, (), True)

    def _render(self, messages: Sequence[ChatMessage], tools: Sequence[object], add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                **self._tokenizer.named_tokens,
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(f"the chat template makes more than {MAX_RENDERED_CHARS} characters of it")
        except jinja2.TemplateError as error:
            raise ChatTemplateError(str(error)) from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError):
            # A template is a program: one that trips over a conversation refuses it, in its clumsy way.
            raise ChatTemplateError("the chat template cannot render this conversation") from None
        return "".join(pieces)

    def _shows_probe(self, *, system: bool) -> bool:
        """Whether a system message (older Mixtral templates raise instead) or a tool reaches the rendered text."""
        probe = "probe_of_the_template"
        messages = [ChatMessage("system", probe)] if system else []
        tool = {"type": "function", "function": {"name": probe, "description": "", "parameters": {"type": "object"}}}
        try:
            rendered = self._render([*messages, ChatMessage("user", "?")], [] if system else [tool], True)
        except ChatTemplateError:
            return False
        return probe in rendered


def load_chat_template(checkpoint: Path, tokenizer: Tokenizer, *, strict: bool = False) -> ChatTemplate | None:
    """The chat template of a checkpoint, or None where it has none (a base model). ``strict`` as ``ChatTemplate``.

    Raises:
        TokenizerError: a file is unreadable, or its template is not one.
    """
    path = checkpoint / TEMPLATE_FILE
    if path.exists():
        return read_chat_template(path, tokenizer, strict=strict)
    path = checkpoint / CONFIG_FILE
    source = _default_template(path, read_json(path).get("chat_template"))
    return None if source is None else _compiled(path, source, tokenizer, strict)


def read_chat_template(path: Path, tokenizer: Tokenizer, *, strict: bool = False) -> ChatTemplate:
    """The template in a file of its own.

    Raises:
        TokenizerError: the file is unreadable, or no template.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(path, f"cannot be read: {error}") from None
    return _compiled(path, source, tokenizer, strict)


def _compiled(path: Path, source: str, tokenizer: Tokenizer, strict: bool) -> ChatTemplate:
    try:
        return ChatTemplate(source, tokenizer, strict=strict)
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
