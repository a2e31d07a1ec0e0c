"""Texts and token ids, one or many: the forms that completions, embeddings and detokenising take alike.

Owns: ``Prompt``, ``token_ids``, ``prompts_of``, and ``prompts_schema``, which describes what the latter takes. A list
may mix strings and lists of ids. Token ids become compact arrays here, so that a long prompt has a known price.

Rejected: a union of types for pydantic, which would try each of them on each of a hundred thousand ids.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic_core import PydanticCustomError

from mixtral_serve.api.schemas.common import INT32_MAX

if TYPE_CHECKING:
    Prompt: TypeAlias = str | array[int]
    Tokens: TypeAlias = array[int]
else:
    Prompt = str | array  # pydantic looks at them, and arrays take no parameter before Python 3.12
    Tokens = array

_FORMS: Final = "It is a string, a list of token ids, or a list of either"
TOKENS_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX},
}
"""JSON schema of what ``token_ids`` takes."""


def token_ids(value: object) -> Tokens:
    """A list of integers as token ids; whether the vocabulary has them is found later.

    Raises:
        PydanticCustomError: it is something else, or one of them is no 32-bit id.
    """
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise PydanticCustomError("invalid_type", "Token ids are a list of integers")
    if value and (min(value) < 0 or max(value) > INT32_MAX):
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary")
    return array("i", value)


def prompts_of(value: object, *, most: int, least_chars: int = 0) -> tuple[Prompt, ...]:
    """All the forms as a tuple of prompts: at most so many, no list of ids empty, no string shorter than that.

    Raises:
        PydanticCustomError: there are none or too many, or one of them has no such form.
    """
    if not isinstance(value, list) or (value and type(value[0]) is int):
        return (_prompt(value, least_chars),)
    if not value:
        raise PydanticCustomError("empty_array", "There is at least one of them")
    if len(value) > most:
        raise PydanticCustomError("array_above_max_length", f"There are at most {most} of them")
    return tuple([_prompt(item, least_chars) for item in value])


def _prompt(value: object, least_chars: int) -> Prompt:
    if isinstance(value, str):
        if len(value) < least_chars:
            raise PydanticCustomError("string_too_short", "A string is not empty")
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", _FORMS)
    if not value:
        raise PydanticCustomError("empty_array", "There is at least one token")
    return token_ids(value)


def prompts_schema(*, most: int, least_chars: int = 0) -> dict[str, Any]:
    """JSON schema of what ``prompts_of`` takes."""
    text = {"type": "string", "minLength": least_chars} if least_chars else {"type": "string"}
    ids = {**TOKENS_SCHEMA, "minItems": 1}
    several = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": most}
    return {"anyOf": [text, ids, several]}
