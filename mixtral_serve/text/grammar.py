"""What an answer must look like, as a grammar: a string that the engine's matcher compiles.

Owns: the functions that make such strings out of a JSON schema, a regular expression, a list of choices, or a grammar
of the client's own. They are cheap; whether a grammar compiles is found by ``grammar_vocabulary.Vocabulary``.

The form is the grammar library's own (llguidance): JSON with two grammars. The first says what comes before the
answer, the second, ``body``, is the answer. The first token of a chat answer carries a space, which the server strips;
with ``after_space`` the grammar demands exactly that space, so that what the client reads is the body to the letter and
the model may begin with the tokens that it was trained to begin with. JSON that continues a prompt may have the space.

JSON is written as Python's ``json.dumps`` writes it, the blank after ``,`` and ``:`` being optional; no other white
space between values. A model that likes line breaks could otherwise go on with them until its tokens are used up.

Invariants: no input, however odd, raises anything but ``GrammarError``; a grammar never names a control token.

Rejected: forcing tokens where the grammar leaves one text only (the model would see cuts of words that it never
learned; with all cuts allowed it chooses its own).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar_limits import check_schema

MAX_GRAMMAR_BYTES: Final = 65_536
"""Of a client's regular expression or grammar, and of all choices together."""
MAX_CHOICES: Final = 1_024

_MAX_GBNF_RULES: Final = 1_024
"""Translating takes time quadratic in them: half a second for so many."""
_JSON_OPTIONS: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_NO_LEAD: Final = ""
_SPACE: Final = '" " '
_OPTIONAL_SPACE: Final = '(" ")? '
_LARK_TOKENS: Final = re.compile(
    r'(?P<hidden>"(?:\\.|[^"\\\n])*+"|//[^\n]*|\#[^\n]*|/(?:\\.|[^/\\\n])++/)|(?P<control><)|(?P<open>["/])', re.DOTALL
)
"""Strings, comments and regular expressions of a Lark grammar; what opens the name of a control token outside them; and
what opens a string or an expression that never closes. Nothing is looked for behind that: doing so at each of many
would take time quadratic in the grammar, and all of it with the interpreter lock held."""
_LARK_RULE: Final = re.compile(r"^[^\S\n]*+(?:%llguidance\b|start\s*:)", re.MULTILINE)
"""What tells Lark from GBNF. The library's own test takes time quadratic in blank lines."""


def json_schema_grammar(schema: Mapping[str, Any], *, after_space: bool) -> str:
    """JSON that validates against ``schema``.

    Properties come in the order of the schema. What the schema does not mention is allowed, as in JSON Schema.

    Raises:
        GrammarError: the schema is too large, too deep, or uses what is not supported.
    """
    check_schema(schema)
    body = {"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}
    return _serialised(body, _SPACE if after_space else _OPTIONAL_SPACE)


def json_object_grammar(*, after_space: bool) -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"}, after_space=after_space)


def regex_grammar(pattern: str, *, after_space: bool) -> str:
    """Text that matches ``pattern`` as a whole (Rust's syntax, which has no look-around and no back-references).

    Raises:
        GrammarError: it is too long.
    """
    _check_length(pattern)
    described = json.loads(LLMatcher.grammar_from_regex(pattern))
    return _serialised({"lark_grammar": described["grammars"][0]["lark_grammar"]}, _lead(after_space))


def choice_grammar(choices: Sequence[str], *, after_space: bool) -> str:
    """One of ``choices``, to the letter.

    Raises:
        GrammarError: there is none, one is empty, or there are too many.
    """
    if not choices or not all(choices):
        raise GrammarError("there is at least one choice, and none is empty")
    if len(choices) > MAX_CHOICES:
        raise GrammarError(f"there are more than {MAX_CHOICES} choices")
    lark = "start: " + " | ".join([json.dumps(choice) for choice in choices])
    _check_length(lark)
    return _serialised({"lark_grammar": lark}, _lead(after_space))


def user_grammar(text: str, *, after_space: bool) -> str:
    """Text of the language that ``text`` describes: in Lark's syntax with a rule ``start``, or GBNF with a ``root``.

    Raises:
        GrammarError: it is too long, is not GBNF where it is not Lark, names a control token, or leaves a string open.
    """
    _check_length(text)
    if not _LARK_RULE.search(text):
        if text.count("::=") > _MAX_GBNF_RULES:
            raise GrammarError(f"it has more than {_MAX_GBNF_RULES} rules in GBNF")
        try:
            text = gbnf_to_lark(text)
        except Exception:  # noqa: BLE001 - the converter raises bare exceptions, and whatever nesting makes of it
            raise GrammarError("it is neither a Lark grammar with a rule 'start' nor GBNF with a rule 'root'") from None
    for match in _LARK_TOKENS.finditer(text):
        if match["control"]:
            raise GrammarError("it names a control token")
        if match["open"]:
            raise GrammarError("it has a string or a regular expression without an end")
    return _serialised({"lark_grammar": text}, _lead(after_space))


def _lead(after_space: bool) -> str:
    return _SPACE if after_space else _NO_LEAD


def _check_length(text: str) -> None:
    if len(text.encode(errors="surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")


def _serialised(body: Mapping[str, object], lead: str) -> str:
    first = f'%llguidance {{"no_forcing": true}}\nstart: {lead}@body'
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": first}, {"name": "body", **body}]})
