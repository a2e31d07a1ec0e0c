"""Between the OpenAI API's words and the engine's.

Owns: the translation of a validated request for text into ``Submit`` messages, of finish reasons, and of token counts
into ``usage``.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from mixtral_serve.api.auth import Caller
from mixtral_serve.api.errors import Interrupted, InvalidRequest
from mixtral_serve.api.schemas.common import GenerationRequest
from mixtral_serve.contract import ModelInfo, SamplingParams
from mixtral_serve.engine.admission import limit_for, resolve_max_tokens
from mixtral_serve.engine.errors import PromptTooLong
from mixtral_serve.engine.messages import Delta, Submit
from scheduler.events import TokenLogprob
from scheduler.lifecycle import FinishReason

MAX_CHOICES: Final = 128
"""Most prompts times ``n`` of one request."""
MAX_SCORES: Final = 200_000
"""Most log-probabilities of prompt tokens in one answer: some 12 MB of JSON."""
_UINT64: Final = 2**64 - 1

_INTERRUPTIONS: Final = {
    FinishReason.CANCELLED.value: "the request was cancelled by the server",
    FinishReason.DEADLINE.value: "the request ran out of time",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where submits come from: whom, when, under which id, in which field the prompt was."""

    answer_id: str
    caller: Caller
    arrival_s: float
    prompt_param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an endpoint makes of a request, beyond the request's own words."""

    default_max_tokens: int | None
    """Where the request sets none; None leaves the rest of the context."""
    strip_leading_space: bool
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of the words that the request forbids."""
    grammar: str | None = None
    """What the answer must match."""


@dataclass(slots=True)
class Choice:
    """One choice of an answer, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """From the prompt's second token on, where they are asked for."""
    finish_reason: str | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Take in the next delta."""
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        self.count(delta)

    def count(self, delta: Delta) -> None:
        """Take in how it ended, without the text."""
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.num_output_tokens = delta.num_output_tokens
            self.num_cached_tokens = delta.num_cached_tokens

    @property
    def text(self) -> str:
        return "".join(self.texts)


def submits_for(
    request: GenerationRequest, prompts: Sequence[array[int]], *, info: ModelInfo, origin: Origin, terms: Terms
) -> tuple[Submit, ...]:
    """One submit per prompt and choice, in the order of the answer's choices.

    Raises:
        InvalidRequest: a prompt has no token, or (with the output asked for) too many, or there are too many choices.
    """
    if not all(prompts):
        message = f"'{origin.prompt_param}' has no tokens: an empty text needs its begin-of-sequence token."
        raise InvalidRequest(message, param=origin.prompt_param, code="empty_string")
    if len(prompts) * request.n > MAX_CHOICES:
        message = f"'n' times the number of prompts is at most {MAX_CHOICES}."
        raise InvalidRequest(message, param="n", code="integer_above_max_value")
    _check_scores(request, sum(map(len, prompts)))
    submits: list[Submit] = []
    for prompt in prompts:
        # A seed of its own for each prompt: equal prompts without a given seed are different draws.
        seed = secrets.randbits(64) if request.seed is None else request.seed & _UINT64
        common = _submit(
            request,
            prompt,
            origin=origin,
            terms=terms,
            max_tokens=_max_tokens(
                request,
                info,
                num_prompt_tokens=len(prompt),
                default=terms.default_max_tokens,
                param=origin.prompt_param,
            ),
        )
        sampling = _sampling(request, seed=seed, bad_words=terms.bad_words)
        for choice in range(request.n):
            # One sibling scores the prompt for all of them; but each choice of a stream tells its own story.
            is_scored = choice == 0 or request.stream
            submits.append(
                msgspec.structs.replace(
                    common,
                    request_id=f"{origin.answer_id}-{len(submits)}",
                    sampling=replace(
                        sampling, choice=choice, prompt_logprobs=request.num_scored() if is_scored else None
                    ),
                )
            )
    return tuple(submits)


def truncated(
    request: GenerationRequest, prompt: array[int], *, info: ModelInfo, terms: Terms, bos: int | None
) -> array[int]:
    """``prompt`` cut as ``truncate_prompt_tokens`` asks; a leading begin-of-sequence token ``bos`` stays and counts."""
    asked = request.truncate_prompt_tokens
    if asked is None:
        return prompt
    most = asked if asked > 0 else max(1, limit_for(info) - _least_output(request, terms))
    if len(prompt) <= most:
        return prompt
    if request.truncation_side == "right":
        return prompt[:most]
    head = prompt[: int(prompt[0] == bos)]
    return head + prompt[len(prompt) - most + len(head) :]


def finish_reason(delta: Delta) -> str | None:
    """OpenAI's word for how a choice ended; None while it goes on.

    Raises:
        Interrupted: it was ended by the server, for which there is no such word.
    """
    if delta.finish_reason in _INTERRUPTIONS:
        raise Interrupted(_INTERRUPTIONS[delta.finish_reason])
    return delta.finish_reason


def usage(prompts: Sequence[array[int]], choices: Sequence[Choice]) -> dict[str, object]:
    """Token counts of an answer. Each prompt counts once, however many choices it has.

    A prompt's cached tokens are those that its luckless first choice found: the siblings' hits are its work.
    """
    n = len(choices) // len(prompts)
    num_prompt_tokens = sum(map(len, prompts))
    num_output_tokens = sum(choice.num_output_tokens for choice in choices)
    num_cached_tokens = sum(
        min(choice.num_cached_tokens for choice in choices[first : first + n]) for first in range(0, len(choices), n)
    )
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def _max_tokens(
    request: GenerationRequest, info: ModelInfo, *, num_prompt_tokens: int, default: int | None, param: str
) -> int:
    try:
        max_tokens = resolve_max_tokens(info, num_prompt_tokens, request.asked_max_tokens(), default=default)
    except PromptTooLong as error:
        raise InvalidRequest(str(error), param=param, code="context_length_exceeded") from None
    if request.min_tokens > max_tokens:
        message = f"'min_tokens' is at most the number of output tokens, here {max_tokens}."
        raise InvalidRequest(message, param="min_tokens", code="integer_above_max_value")
    return max_tokens


def _least_output(request: GenerationRequest, terms: Terms) -> int:
    """Tokens that a cut prompt leaves room for."""
    asked = request.asked_max_tokens()
    return max(1, request.min_tokens, terms.default_max_tokens or 0) if asked is None else asked


def _check_scores(request: GenerationRequest, num_prompt_tokens: int) -> None:
    """Each choice of an answer repeats its prompt's log-probabilities."""
    asked = request.num_scored()
    if asked is not None and num_prompt_tokens * request.n * (1 + asked) > MAX_SCORES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        message = f"'{param}': {MAX_SCORES} log-probabilities of prompt tokens are given at most."
        raise InvalidRequest(message, param=param, code="integer_above_max_value")


def _submit(request: GenerationRequest, prompt: array[int], *, origin: Origin, terms: Terms, max_tokens: int) -> Submit:
    """What all choices of a prompt have in common."""
    return Submit(
        request_id=origin.answer_id,
        prompt=prompt.tobytes(),
        arrival_s=origin.arrival_s,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        stop=tuple(request.stop),
        include_stop=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        strip_leading_space=terms.strip_leading_space,
        report_progress=request.return_progress,
        priority=request.priority,
        tenant=origin.caller.tenant,
        cache_salt=request.cache_salt,
        grammar=terms.grammar,
    )


def _sampling(request: GenerationRequest, *, seed: int, bad_words: tuple[tuple[int, ...], ...]) -> SamplingParams:
    """What all choices of a prompt have in common."""
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        seed=seed,
        logprobs=request.num_logprobs(),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=tuple((int(key), bias) for key, bias in request.logit_bias.items()),
        allowed_token_ids=tuple(request.allowed_token_ids or ()),
        bad_words=bad_words,
    )
