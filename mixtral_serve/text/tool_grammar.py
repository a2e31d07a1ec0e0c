"""Calls of functions as a grammar: what an answer may look like when functions are offered.

Owns: ``CallableFunction`` and ``tool_grammar``. The form of calls is that of ``tool_text``; ``tool_calls`` reads it
back. With a grammar a call can name no function that was not offered, and its arguments always validate against its
parameters.

Where text is allowed besides, the beginning decides: an answer that begins like a call, ``[{"name": "``, is one, every
other is text. Until those eleven characters are complete both are open, so a text may well begin with a bracket.
JSON is written as ``json.dumps`` does, with one blank after ``,`` and ``:``: that is how definitions and earlier calls
stand in the prompt.

Rejected: one JSON schema for the array of calls (it cannot express the alternative of text), and a trigger that turns
the grammar on when a call begins (what was sampled before could not be taken back).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mixtral_serve.text.grammar import json_schema_grammar, user_grammar
from mixtral_serve.text.grammar_limits import check_schema

OPENING: Final = '[{"name": "'
"""How every array of calls begins."""
NEXT: Final = ', {"name": "'
ARGUMENTS: Final = '", "arguments": '
CLOSING: Final = "]"
MAX_CALLS: Final = 32
"""Most calls of one answer: a model that repeats itself comes to an end."""

_ANSWER: Final = "answer"
_JSON_STYLE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class CallableFunction:
    """A function that an answer may call."""

    name: str
    """Letters, digits, ``_`` and ``-`` only: it needs no escaping anywhere."""
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, which are an object."""


def tool_grammar(
    functions: Sequence[CallableFunction],
    *,
    parallel: bool,
    text_allowed: bool,
    answer_schema: Mapping[str, Any] | None = None,
) -> str:
    """What ``Submit.grammar`` takes: calls of ``functions``, at least one, or any text where ``text_allowed``.

    Without ``parallel`` there is exactly one call. With ``answer_schema``, of an object, the text is JSON that
    validates against it. All come after the one space that a chat answer begins with.

    Raises:
        GrammarError: parameters that no grammar can keep, or all of them together are too large.
    """
    firsts, others, rules = [], [], []
    for index, function in enumerate(functions):
        check_schema(function.parameters)
        schema = {**function.parameters, "type": "object", "x-guidance": _JSON_STYLE}
        firsts.append(f'FIRST_{index} arguments_{index} "}}"')
        others.append(f'NEXT_{index} arguments_{index} "}}"')
        rules += [
            f"FIRST_{index}: {_quoted(OPENING + function.name + ARGUMENTS)}",
            f"NEXT_{index}: {_quoted(NEXT + function.name + ARGUMENTS)}",
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
    more = f"next{{0,{MAX_CALLS - 1}}} " if parallel else ""
    lines = [
        "start: calls" + _text_alternative(text_allowed, answer_schema),
        f"calls: first {more}{_quoted(CLOSING)}",
        f"first: {' | '.join(firsts)}",
        *([f"next: {' | '.join(others)}"] if parallel else []),
        *rules,
        *([f"TEXT: /{_not_beginning_with(OPENING)}/"] if text_allowed and answer_schema is None else []),
    ]
    grammar = user_grammar("\n".join(lines), after_space=True)
    return grammar if not text_allowed or answer_schema is None else _with_answer(grammar, answer_schema)


def _text_alternative(text_allowed: bool, answer_schema: Mapping[str, Any] | None) -> str:
    if not text_allowed:
        return ""
    return " | TEXT |" if answer_schema is None else f" | @{_ANSWER}"


def _with_answer(grammar: str, schema: Mapping[str, Any]) -> str:
    """``grammar`` with one more to refer to: the body of the schema's own."""
    whole = json.loads(grammar)
    parts = json.loads(json_schema_grammar(schema, after_space=True))["grammars"]
    whole["grammars"].append({**parts[-1], "name": _ANSWER})
    return json.dumps(whole)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _not_beginning_with(prefix: str) -> str:
    """A regular expression of all texts but the empty one and those that begin with ``prefix``."""
    pattern = ""
    for character in reversed(prefix):
        literal = re.escape(character)
        # Either another character and anything, or this one and what may follow it; the text may end after it.
        pattern = rf"([^{literal}](.|\n)*|{literal}({pattern})?)" if pattern else rf"[^{literal}](.|\n)*"
    return pattern
