"""``POST /v1/embeddings``: what a client may send.

Owns: ``EmbeddingRequest``. Its inputs have the forms of a completion's prompt: a string, token ids, or a list of
either; there may be as many as OpenAI takes.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mixtral_serve.api.schemas.common import INT32_MAX, Label
from mixtral_serve.api.schemas.refused import Refused
from mixtral_serve.api.schemas.tokens import NamedRequest

MAX_INPUTS: Final = 2048

EMBEDDING_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    "truncate_prompt_tokens": Refused("shorten the input yourself"),
    "normalize": Refused("embeddings are of length one", (True,)),
    "input_type": Refused("the model does not tell queries from passages"),
    "embed_dtype": Refused("elements are 32-bit floats", ("float32",)),
    "endianness": Refused("base64 is little-endian", ("little",)),
}
"""Fields of peers."""

if TYPE_CHECKING:
    Input: TypeAlias = str | array[int]
else:
    Input = str | array  # pydantic looks at it, and arrays take no parameter before Python 3.12

_FORMS: Final = "An input is a string or a list of token ids"


def _input(value: object) -> Input:
    if isinstance(value, str):
        if not value:
            raise PydanticCustomError("string_too_short", "An input is not empty")
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", _FORMS)
    if not value:
        raise PydanticCustomError("empty_array", "An input has at least one token")
    return _token_ids(value)


def _token_ids(ids: list[Any]) -> array[int]:
    if set(map(type, ids)) != {int}:
        raise PydanticCustomError("invalid_type", _FORMS)
    if min(ids) < 0 or max(ids) > INT32_MAX:
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary")
    return array("i", ids)


def _inputs(value: object) -> tuple[Input, ...]:
    """All the forms of ``input`` as a tuple of inputs."""
    if not isinstance(value, list) or (value and type(value[0]) is int):
        return (_input(value),)
    if not value:
        raise PydanticCustomError("empty_array", "There is at least one input")
    if len(value) > MAX_INPUTS:
        raise PydanticCustomError("array_above_max_length", f"There are at most {MAX_INPUTS} inputs")
    return tuple([_input(item) for item in value])


_IDS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}, "minItems": 1}
_TEXT: Final = {"type": "string", "minLength": 1}
_INPUT_SCHEMA: Final = {
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}


class EmbeddingRequest(NamedRequest):
    """An embedding request."""

    model: str = Field(min_length=1, max_length=256)
    """One of the names that ``GET /v1/models`` lists."""
    input: Annotated[tuple[Input, ...], PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)]
    """A string, token ids, or a list of either. A string gets a begin-of-sequence token, ids are taken as they are."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the base64 of little-endian 32-bit floats."""
    dimensions: int | None = Field(default=None, ge=1, le=INT32_MAX)
    """Keep so many leading elements, brought back to length one. At most those that the model has."""
    user: Label | None = None
    """A label: checked, without effect."""
    priority: int = Field(default=0, ge=-INT32_MAX, le=INT32_MAX)
    """Lower runs sooner, under a policy that looks at it."""
