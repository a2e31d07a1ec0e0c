"""``/tokenize``, ``/detokenize`` and ``/apply-template``: what a client may send, in vLLM's forms.

Owns: ``NamedRequest`` (a request that may name the model it means), ``TokenizeRequest``, ``DetokenizeRequest`` and the
fields that are refused by name. A conversation is not described here: it is checked as the chat endpoint
checks it, so that what is counted is what would be computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final

from pydantic import Field, PlainValidator, WithJsonSchema

from mixtral_serve.api.schemas.common import StrictModel
from mixtral_serve.api.schemas.prompts import TOKENS_SCHEMA, Tokens, token_ids
from mixtral_serve.api.schemas.refused import Refused

CONVERSATION_FIELDS: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "messages", "tool_choice", "tools"}
)
"""What of ``/tokenize`` and ``/apply-template`` belongs to the conversation."""

TOKENIZE_UNSUPPORTED: Final[Mapping[str, Refused]] = {
    "chat_template": Refused("a request brings no template"),
    "chat_template_kwargs": Refused("the chat template takes no arguments", ({},)),
    "mm_processor_kwargs": Refused("prompts are text", ({},)),
}
"""Fields of peers."""


class NamedRequest(StrictModel):
    """A request that may name the model it means."""

    model: str | None = Field(default=None, min_length=1, max_length=256)
    """One of the names that ``GET /v1/models`` lists. Without it, the model that is served."""


class TokenizeRequest(NamedRequest):
    """A text to be encoded."""

    prompt: str
    """The text."""
    add_special_tokens: bool = True
    """The text gets a begin-of-sequence token."""
    return_token_strs: bool = False
    """Also the text of each token."""


class TokenizeChatRequest(NamedRequest):
    """A conversation to be encoded, beside the fields of the conversation itself."""

    return_token_strs: bool = False
    """Also the text of each token."""


class DetokenizeRequest(NamedRequest):
    """Token ids to be turned into text."""

    tokens: Annotated[Tokens, PlainValidator(token_ids), WithJsonSchema(TOKENS_SCHEMA)]
    """The ids."""
