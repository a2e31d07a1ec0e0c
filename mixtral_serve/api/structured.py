"""Structured output on its way in: from what a request asks for to a grammar that is known to compile.

Owns: ``GrammarMaker``. It compiles each grammar once, in one side thread (the library releases the interpreter lock),
with a vocabulary and limits like the engine's, so that a schema that cannot be kept is a 400 with the reason and not a
failed answer. Grammars that were found good are remembered by their digest.

Invariants: nothing here blocks the event loop; one compiles at a time, so that many of them cost time and not memory;
the reason never repeats the input.

Rejected: compiling in the engine alone (its refusal would come after the answer has begun); handing the compiled
grammar over (it does not leave its process).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, Final

import msgspec

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.structured import ResponseFormat, StructuredOutputs, StructuredRequest
from mixtral_serve.text.errors import GrammarError
from mixtral_serve.text.grammar import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
    user_grammar,
)
from mixtral_serve.text.grammar_vocabulary import Vocabulary
from mixtral_serve.text.tokenizer import Tokenizer

_MAX_KNOWN: Final = 1024


class GrammarMaker:
    """Makes and checks the grammars of requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._vocabulary: Vocabulary | None = None  # these two are the side thread's own
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def of(self, request: StructuredRequest, *, after_space: bool) -> str | None:
        """The grammar that a request asks for; None where any text will do.

        ``after_space``: the answer begins with the space that the server strips.

        Raises:
            InvalidRequest: it asks for one that cannot be kept.
        """
        constraint = request.constraint
        if constraint is None:
            return None
        if isinstance(constraint, StructuredOutputs):
            param, make = _of_structured_outputs(constraint, after_space=after_space)
        else:
            param, make = _of_response_format(constraint, after_space=after_space)
        return await self.checked(make, param=param)

    async def checked(self, make: Callable[[], str], *, param: str) -> str:
        """What ``make`` makes, once it is known to compile. ``make`` runs in the side thread.

        Raises:
            InvalidRequest: it cannot be made or compiled; names ``param``.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._check, make)
        except GrammarError as error:
            raise InvalidRequest(f"'{param}': {error}.", param=param, code="invalid_value") from None

    def _check(self, make: Callable[[], str]) -> str:
        """In the side thread."""
        grammar = make()
        digest = blake2b(grammar.encode(), digest_size=16).digest()
        if digest not in self._known:
            if self._vocabulary is None:
                eos = self._tokenizer.eos_token_id
                assert eos is not None, "a tokenizer without end-of-sequence is not loaded"
                table = self._tokenizer.token_bytes
                self._vocabulary = Vocabulary(table, eos_token_ids=(eos,), vocab_size=len(table))
            self._vocabulary.compile(grammar)
            self._known[digest] = None
            while len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return grammar


def _of_response_format(asked: ResponseFormat, *, after_space: bool) -> tuple[str, Callable[[], str]]:
    """The parameter that describes the answer, and what makes its grammar."""
    described = asked.json_schema
    if described is None:
        return "response_format", lambda: json_object_grammar(after_space=after_space)
    schema = described.json_schema
    return "response_format.json_schema.schema", lambda: json_schema_grammar(schema, after_space=after_space)


def _of_structured_outputs(asked: StructuredOutputs, *, after_space: bool) -> tuple[str, Callable[[], str]]:
    """The same for vLLM's parameter."""
    path = "structured_outputs."
    schema, regex, choice, text = asked.json_schema, asked.regex, asked.choice, asked.grammar
    if schema is not None:
        return path + "json", lambda: json_schema_grammar(_object(schema), after_space=after_space)
    if regex is not None:
        return path + "regex", lambda: regex_grammar(regex, after_space=after_space)
    if choice is not None:
        return path + "choice", lambda: choice_grammar(choice, after_space=after_space)
    if text is not None:
        return path + "grammar", lambda: user_grammar(text, after_space=after_space)
    return path + "json_object", lambda: json_object_grammar(after_space=after_space)


def _object(schema: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise GrammarError("it is not a JSON object") from None
