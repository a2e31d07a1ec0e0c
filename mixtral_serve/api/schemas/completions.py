"""``POST /v1/completions``: what a client may send.

Owns: ``CompletionRequest``. The forms of its prompt are in ``schemas.prompts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import Field, PlainValidator, WithJsonSchema

from mixtral_serve.api.schemas.common import MAX_LOGPROBS
from mixtral_serve.api.schemas.prompts import Prompt, prompts_of, prompts_schema
from mixtral_serve.api.schemas.refused import COMPLETION_UNSUPPORTED, Screen
from mixtral_serve.api.schemas.structured import StructuredRequest

MAX_PROMPTS: Final = 128


def _prompts(value: object) -> tuple[Prompt, ...]:
    return prompts_of(value, most=MAX_PROMPTS)


class CompletionRequest(StructuredRequest):
    """A completion request."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema(prompts_schema(most=MAX_PROMPTS))]
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
