"""What requests for text have in common: chats, completions and responses.

Owns: ``GenerationRequest``, the fields and bounds that they share. The docstring of a field is what
``docs/api.md`` says of it.

Rules: ``null`` means absent, for every field; numbers are finite; types are strict (``"1"`` and ``true`` are no
numbers); an unknown field is an error. What is not implemented is refused by name (``schemas.refused``), never
ignored. Fields that only label the request (``user``, ``prompt_cache_key``, ...) are checked and accepted: they
promise nothing about the answer.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.refused import MAX_ITEMS, MAX_LOGIT_BIASES

MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_BAD_WORDS: Final = 128
MAX_BIAS: Final = 100.0
INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1
_TOKEN_KEY: Final = re.compile(r"0|[1-9][0-9]{0,9}")


def _stop_list(value: object) -> object:
    """A single stop string is a list of one; the message says what both forms may be."""
    return [value] if isinstance(value, str) else value


def _token_id(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= INT32_MAX:
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary")
    return value


def _token_keys(value: object) -> object:
    """The keys of ``logit_bias`` are token ids, spelled as JSON must spell keys."""
    if isinstance(value, dict) and not all(isinstance(key, str) and _TOKEN_KEY.fullmatch(key) for key in value):
        raise PydanticCustomError("invalid_value", "The keys are token ids, as strings of digits")
    return value


Label = Annotated[str, Field(max_length=512)]
TokenId = Annotated[int, BeforeValidator(_token_id)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class StrictModel(BaseModel):
    """Strict types, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class StreamOptions(StrictModel):
    """How a stream is framed."""

    include_usage: bool = False
    """A last chunk with the token counts, before ``[DONE]``."""
    continuous_usage_stats: bool = False
    """The counts so far, over all choices, in every chunk. Only with ``include_usage``."""


class GenerationRequest(StrictModel):
    """Fields of all endpoints that generate; what one of them has no use for it refuses by name."""

    model: str = Field(min_length=1, max_length=256)
    """One of the names that ``GET /v1/models`` lists."""
    stream: bool = False
    """Answer with server-sent events, one per step that adds text."""
    stream_options: StreamOptions | None = None
    """Only with ``stream``."""
    return_progress: bool = False
    """Chunks with ``prompt_progress`` while a long prompt is computed, in llama.cpp's form. Only with ``stream``."""
    n: int = Field(default=1, ge=1)
    """Choices per prompt. The operator's ``max_n`` bounds it, 16 by default; prompts times choices: 128."""
    max_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    """Most tokens of the answer. By default 16 in a text completion, and what the context leaves in a chat. More than
    the context leaves is an error, not cut. 0 samples nothing: the prompt is scored where its log-probabilities are
    asked for, and its keys and values are left in the prefix cache otherwise."""
    min_tokens: int = Field(default=0, ge=0, le=INT32_MAX)
    """Before so many tokens neither end-of-sequence nor a stop token is sampled, and no stop string counts. An
    answer that must match something ends when nothing can follow, however few its tokens."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    """Divides the logits. 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of likeliest tokens that reaches this probability."""
    top_k: int = Field(default=0, ge=-1, le=INT32_MAX)
    """Keep so many of the likeliest tokens; 0 and -1 keep all."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Drop tokens less likely than this share of the likeliest one."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logit of each token that the answer holds already."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logit of a token once for each time that the answer holds it."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=2.0)
    """Divides the positive logits, and multiplies the negative ones, of tokens in prompt or answer."""
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_token_keys)] = Field(
        default={}, max_length=MAX_LOGIT_BIASES
    )
    """Token id to a number that is added to its logit."""
    allowed_token_ids: list[TokenId] | None = Field(default=None, min_length=1, max_length=MAX_ITEMS)
    """No other token is sampled."""
    bad_words: list[StopString] = Field(default=[], max_length=MAX_BAD_WORDS)
    """The answer never completes the tokens of one of these words, as it is encoded after a space or after another
    character. Other ways to spell it are not found."""
    seed: int | None = Field(default=None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    """With it the sampled text is a function of the prompt, the parameters and the choice's index. Drawn by the server
    where none is given."""
    stop: Annotated[list[StopString], BeforeValidator(_stop_list), Field(max_length=MAX_STOPS)] = []
    """The answer ends before the first of these strings. A single string will do."""
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64)
    """The answer ends at the first of these tokens, which has no text."""
    ignore_eos: bool = False
    """End-of-sequence does not end the answer."""
    include_stop_str_in_output: bool = False
    """The stop string, or stop token, that ended the answer is part of it."""
    skip_special_tokens: bool = True
    """Control tokens have no text."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT32_MAX)
    """Cut a longer prompt to so many tokens; a leading begin-of-sequence stays, and counts. -1: to what the context
    leaves beside the answer. 0 is refused."""
    truncation_side: Literal["left", "right"] = "left"
    """The side of the prompt that ``truncate_prompt_tokens`` cuts off."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the prompt's tokens with so many of the likeliest at each position, in vLLM's form. Not with
    ``stream``. Prompt tokens times choices times one more than this: 200000 at most in one request."""
    return_token_ids: bool = False
    """``prompt_token_ids`` and ``token_ids``, in vLLM's form."""
    return_tokens_as_token_ids: bool = False
    """Log-probabilities, where they are asked for, name tokens as ``token_id:ID``."""
    priority: int = Field(default=0, ge=-INT32_MAX, le=INT32_MAX)
    """Lower runs sooner, under a policy that looks at it."""
    cache_salt: str = Field(default="", max_length=128)
    """Requests share cached prefixes only under equal salts."""
    user: Label | None = None
    """A label: checked, without effect."""
    safety_identifier: Label | None = None
    """A label: checked, without effect."""
    prompt_cache_key: Label | None = None
    """A label: checked, without effect. One engine serves all, so there is nothing to route."""
    metadata: dict[Annotated[str, Field(max_length=64)], Label] = Field(default={}, max_length=16)
    """A label: checked, without effect. Whole answers of chats and responses repeat it."""

    def check_fields(self, *, max_n: int) -> None:
        """Rules that span several fields, or depend on settings.

        Raises:
            InvalidRequest: naming the field.
        """
        if self.n > max_n:
            raise InvalidRequest(f"'n' is at most {max_n}.", param="n", code="integer_above_max_value")
        if self.stream_options is not None and not self.stream:
            raise _contradiction("stream_options", "'stream_options' is only allowed when 'stream' is true.")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats and not self.wants_usage:
            param = "stream_options.continuous_usage_stats"
            raise _contradiction(param, f"'{param}' is only allowed when 'stream_options.include_usage' is true.")
        if self.return_progress and not self.stream:
            raise _contradiction("return_progress", "'return_progress' is only allowed when 'stream' is true.")
        if self.prompt_logprobs is not None and self.stream:
            raise _contradiction("prompt_logprobs", "'prompt_logprobs' is only allowed when 'stream' is false.")
        if self.truncate_prompt_tokens == 0:
            message = "'truncate_prompt_tokens' leaves at least one token, or is -1."
            raise InvalidRequest(message, param="truncate_prompt_tokens", code="integer_below_min_value")
        most = self.asked_max_tokens()
        if most is not None and self.min_tokens > most:
            raise InvalidRequest(
                "'min_tokens' is not above the largest number of tokens asked for.",
                param="min_tokens",
                code="integer_above_max_value",
            )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def asked_max_tokens(self) -> int | None:
        """The explicit bound of the output, or None."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token; None where no log-probabilities are wanted."""
        raise NotImplementedError

    def num_scored(self) -> int | None:
        """Alternatives wanted per token of the prompt; None where it need not be scored."""
        return self.prompt_logprobs


def _contradiction(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
