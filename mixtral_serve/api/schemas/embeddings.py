"""``POST /v1/embeddings``: what a client may send.

Owns: ``EmbeddingRequest``. Its inputs have the forms of a completion's prompt (``schemas.prompts``), but none is empty;
there may be as many as OpenAI takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from mixtral_serve.api.schemas.common import INT32_MAX, Label
from mixtral_serve.api.schemas.prompts import Prompt, prompts_of, prompts_schema
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


def _inputs(value: object) -> tuple[Prompt, ...]:
    return prompts_of(value, most=MAX_INPUTS, least_chars=1)


class EmbeddingRequest(NamedRequest):
    """An embedding request."""

    model: str = Field(min_length=1, max_length=256)
    """One of the names that ``GET /v1/models`` lists."""
    input: Annotated[
        tuple[Prompt, ...], PlainValidator(_inputs), WithJsonSchema(prompts_schema(most=MAX_INPUTS, least_chars=1))
    ]
    """A string, token ids, or a list of either. A string gets a begin-of-sequence token, ids are taken as they are."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or the base64 of little-endian 32-bit floats."""
    dimensions: int | None = Field(default=None, ge=1, le=INT32_MAX)
    """Keep so many leading elements, brought back to length one. At most those that the model has."""
    user: Label | None = None
    """A label: checked, without effect."""
    priority: int = Field(default=0, ge=-INT32_MAX, le=INT32_MAX)
    """Lower runs sooner, under a policy that looks at it."""
