"""``response_format`` and ``structured_outputs``: what an answer must look like.

Owns: ``ResponseFormat``, OpenAI's parameter, ``StructuredOutputs``, vLLM's, and ``StructuredRequest``, a request that
has both. Each is one flat model with a rule of its own: a union's messages would repeat what the client sent.

Whether a schema, an expression or a grammar can be kept is not known here: ``api.structured`` compiles it, off the
event loop, before the request goes to the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import GenerationRequest, StrictModel
from mixtral_serve.text.grammar import MAX_CHOICES, MAX_GRAMMAR_BYTES

_MAX_DESCRIPTION_CHARS: Final = 4096


def _schema_or_text(value: object) -> object:
    if isinstance(value, str):
        if len(value) > MAX_GRAMMAR_BYTES:
            raise PydanticCustomError("string_too_long", "The schema is too long")
    elif value is not None and not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "A schema is an object, or a string that spells one")
    return value


Choice = Annotated[str, Field(min_length=1, max_length=4096)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_BYTES)]


class JsonSchemaFormat(StrictModel):
    """A JSON schema that the answer validates against."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = Field(default=None, max_length=_MAX_DESCRIPTION_CHARS)
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The answer keeps to the schema in either case."""


class ResponseFormat(StrictModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("invalid_value", "'json_schema' is given with the type 'json_schema', only then")
        return self


class StructuredOutputs(StrictModel):
    """vLLM's ``structured_outputs``: exactly one of them."""

    json_schema: Annotated[Any, BeforeValidator(_schema_or_text)] = Field(default=None, alias="json")
    """A JSON schema, as an object or as a string."""
    regex: GrammarText | None = None
    choice: list[Choice] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: GrammarText | None = None
    """In Lark's syntax with a rule ``start``, or GBNF with a rule ``root``."""
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_exactly_one(self) -> Self:
        fields = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object)
        if sum(value is not None for value in fields) != 1:
            raise PydanticCustomError("invalid_value", "Exactly one of its fields is given")
        return self


class StructuredRequest(GenerationRequest):
    """A request whose answer may be constrained."""

    response_format: ResponseFormat | None = None
    """The answer is any text, a JSON object, or JSON that validates against a schema, also where ``strict`` is false.
    It ends with ``stop`` when it is complete; ``max_tokens`` and ``stop`` can end it earlier."""
    structured_outputs: StructuredOutputs | None = None
    """The answer matches ``json`` (a schema), ``regex``, ``choice``, ``grammar`` (Lark or GBNF), or is any JSON object
    with ``json_object``; exactly one of them is given, and no ``response_format``."""

    def check_fields(self, *, max_n: int) -> None:
        """See ``GenerationRequest``."""
        super().check_fields(max_n=max_n)
        is_formatted = self.response_format is not None and self.response_format.type != "text"
        if is_formatted and self.structured_outputs is not None:
            message = "'structured_outputs' and 'response_format' contradict each other."
            raise InvalidRequest(message, param="structured_outputs", code="invalid_value")

    @property
    def constraint(self) -> ResponseFormat | StructuredOutputs | None:
        """What the answer must look like; None for any text."""
        if self.structured_outputs is not None:
            return self.structured_outputs
        return None if self.response_format is None or self.response_format.type == "text" else self.response_format
