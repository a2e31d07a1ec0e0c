"""What chat and completions requests have in common.

Owns: ``GenerationRequest``, the fields and bounds shared by both endpoints, and ``refuse_unsupported``, which
answers fields that the OpenAI API (or a peer) documents and this server does not implement.

Rules: ``null`` means absent, for every field; numbers are finite; types are strict (``"1"`` and ``true`` are no
numbers); an unknown field is an error. A field that is not implemented is refused by name unless it asks for
what happens anyway (``frequency_penalty: 0``, ``logit_bias: {}``); it is never ignored. Fields that only label
the request (``user``, ``metadata``, ...) are checked and accepted: they promise nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest, clean_name

MAX_STOPS: Final = 4
MAX_STOP_CHARS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_KEYS: Final = 64
MAX_ITEMS: Final = 1024
_INT32_MAX: Final = 2**31 - 1
_INT64_MAX: Final = 2**63 - 1

UNSUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "use_beam_search": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logprob_token_ids": (),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Documented elsewhere, not implemented here: name -> the values that ask for what happens anyway."""


def refuse_unsupported(
    fields: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]], *, path: str = ""
) -> dict[str, Any]:
    """``fields`` without nulls and without unsupported fields that ask for nothing.

    Sizes are bounded here, before the schema looks: it would describe each of a hundred thousand faults.

    Raises:
        InvalidRequest: an unsupported field asks for something, or there is far too much of something.
    """
    if len(fields) > MAX_KEYS:
        raise InvalidRequest(
            f"An object has at most {MAX_KEYS} fields.", param=path.rstrip(".") or None, code="array_above_max_length"
        )
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        _check_size(path + clean_name(name), value)
        if name not in unsupported:
            kept[name] = value
        elif not any(_is_same(value, neutral) for neutral in unsupported[name]):
            param = path + clean_name(name)
            raise InvalidRequest(
                f"'{param}' is not supported by this server.", param=param, code="unsupported_parameter"
            )
    return kept


def _check_size(param: str, value: object) -> None:
    is_too_large = isinstance(value, dict) and len(value) > MAX_KEYS
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        is_too_large = param != "prompt"  # which counts tokens, and is checked at once
    if is_too_large:
        raise InvalidRequest(f"'{param}' has too many items.", param=param, code="array_above_max_length")


def _is_same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _stop_list(value: object) -> object:
    """A single stop string is a list of one; the message says what both forms may be."""
    return [value] if isinstance(value, str) else value


def _token_id(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= _INT32_MAX:
        raise PydanticCustomError("invalid_value", "Token ids lie in the vocabulary")
    return value


Label = Annotated[str, Field(max_length=512)]
TokenId = Annotated[int, BeforeValidator(_token_id)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class StrictModel(BaseModel):
    """Strict types, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """How a stream is framed."""

    include_usage: bool = False
    """A last chunk with the token counts, before ``[DONE]``."""


class GenerationRequest(StrictModel):
    """Fields of both endpoints."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=1, le=_INT32_MAX)
    min_tokens: int = Field(default=0, ge=0, le=_INT32_MAX)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=_INT32_MAX)
    """0 and -1 keep all tokens."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    stop: Annotated[list[StopString], BeforeValidator(_stop_list), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: int = Field(default=0, ge=-_INT32_MAX, le=_INT32_MAX)
    """Lower runs sooner, under a policy that looks at it."""
    cache_salt: str = Field(default="", max_length=128)
    """Requests share cached prefixes only under equal salts."""
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] = Field(default={}, max_length=16)

    def check_fields(self, *, max_n: int) -> None:
        """Rules that span several fields, or depend on settings.

        Raises:
            InvalidRequest: naming the field.
        """
        if self.n > max_n:
            raise InvalidRequest(f"'n' is at most {max_n}.", param="n", code="integer_above_max_value")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
            )
        most = self.asked_max_tokens()
        if most is not None and self.min_tokens > most:
            raise InvalidRequest(
                "'min_tokens' is not above the largest number of tokens asked for.",
                param="min_tokens",
                code="integer_above_max_value",
            )

    def asked_max_tokens(self) -> int | None:
        """The explicit bound of the output, or None."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token; None where no log-probabilities are wanted."""
        raise NotImplementedError
