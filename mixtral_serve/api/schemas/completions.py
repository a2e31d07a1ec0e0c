"""``POST /v1/completions``: what a client may send.

Owns: ``CompletionRequest`` and the forms of its prompt: a string, a list of strings, token ids, a list of lists
of token ids, or a mixed list. Token ids become compact arrays here, so that a long prompt has a known price.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mixtral_serve.api.schemas.common import MAX_LOGPROBS
from mixtral_serve.api.schemas.refused import COMPLETION_UNSUPPORTED, Screen
from mixtral_serve.api.schemas.structured import StructuredRequest

MAX_PROMPTS: Final = 128

if TYPE_CHECKING:
    Prompt: TypeAlias = str | array[int]
else:
    Prompt = str | array  # pydantic looks at it, and arrays take no parameter before Python 3.12


def _token_ids(ids: list[Any]) -> array[int]:
    if set(map(type, ids)) != {int}:
        raise PydanticCustomError("invalid_type", "A prompt is a string or a list of token ids")
    try:
        tokens = array("i", ids)
    except OverflowError:
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary") from None
    if min(tokens) < 0:
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary")
    return tokens


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "A prompt is a string or a list of token ids")
    if not value:
        raise PydanticCustomError("empty_array", "A prompt has at least one token")
    return _token_ids(value)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """All the forms of ``prompt`` as a tuple of prompts."""
    if not isinstance(value, list) or (value and type(value[0]) is int):
        return (_prompt(value),)
    if not value:
        raise PydanticCustomError("empty_array", "There is at least one prompt")
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("array_above_max_length", f"There are at most {MAX_PROMPTS} prompts")
    return tuple(_prompt(item) for item in value)


_PROMPT_SCHEMA: Final = {
    "oneOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}


class CompletionRequest(StructuredRequest):
    """A completion request."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    """A string, token ids, or a list of either. A string gets a begin-of-sequence token, ids are taken as they are."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the answer's tokens, of the logits as the model gives them, with so many of the likeliest at
    each position; with ``echo`` of the prompt's too."""
    echo: bool = False
    """The text begins with the prompt's."""
    add_special_tokens: bool = True
    """Strings get a begin-of-sequence token."""

    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return self.logprobs

    def num_scored(self) -> int | None:
        """See ``GenerationRequest``."""
        wanted = [asked for asked in (self.prompt_logprobs, self.logprobs if self.echo else None) if asked is not None]
        return max(wanted, default=None)


def screened_completion(fields: Mapping[str, Any], screen: Screen) -> dict[str, Any]:
    """A completion body without nulls and neutral unsupported fields.

    Raises:
        InvalidRequest: an unsupported field.
    """
    return screen.request(fields, COMPLETION_UNSUPPORTED)
