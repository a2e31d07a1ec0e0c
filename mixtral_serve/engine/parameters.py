"""What a request's parameters mean to the engine: which are refused, what they weigh, what the sampler is told.

Owns: ``check_parameters`` (ids of tokens and words that make no sense), ``sampling_of`` (what follows from the stop
rule: which tokens are suppressed before ``min_tokens``) and ``extra_bytes`` (what the accountant sets aside besides a
plain request). All pure.

Invariants: what passes ``check_parameters`` cannot make the sampler fail, only end its own request; bounds on numbers
and lengths are the API's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mixtral_serve.contract import SamplingParams
from mixtral_serve.engine.errors import TokenOutOfRange
from mixtral_serve.engine.messages import Submit
from scheduler.accountant import logprob_bytes
from scheduler.errors import InvalidRequestError
from scheduler.request import RequestKind, StopRule

BIAS_BYTES: Final = 128
"""One entry of ``logit_bias`` as Python holds it: a pair, an id, a number and a place in a tuple."""
TOKEN_ID_BYTES: Final = 40
"""One id in a tuple."""
STOP_TOKEN_BYTES: Final = 160
"""One stop token: in the message, in the set that ends the request and in the tuple that is suppressed."""
_NUM_SIDES: Final = 2
"""The API process holds what it sent as long as the engine does."""


def check_parameters(sampling: SamplingParams, vocab_size: int) -> None:
    """Every token id must be a row of the model's head, every bad word a token.

    Raises:
        TokenOutOfRange: names the field and the first offender.
        InvalidRequestError: a bad word is empty.
    """
    fields = {
        "logit_bias": [token_id for token_id, _ in sampling.logit_bias],
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words": [token_id for word in sampling.bad_words for token_id in word],
    }
    for field, token_ids in fields.items():
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise TokenOutOfRange(field, token_id, vocab_size)
    if not all(sampling.bad_words):
        raise InvalidRequestError("bad_words", "a word of no token is completed by everything")


def sampling_of(submit: Submit, stop: StopRule) -> SamplingParams:
    """The request's parameters, with what its stop rule suppresses: one truth for the scheduler and the sampler.

    Without it a stop token before ``min_tokens`` would not end the request but stand in its output, and the model would
    go on behind the end of its text.
    """
    if not stop.min_tokens:
        return submit.sampling
    suppressed = tuple(sorted(stop.stop_token_ids))
    return replace(submit.sampling, min_tokens=stop.min_tokens, suppressed_token_ids=suppressed)


def extra_bytes(num_prompt_tokens: int, submit: Submit) -> int:
    """What the request's structures may weigh beyond ``accountant.request_bytes``, until its client has read all."""
    sampling = submit.sampling
    scores = sampling.prompt_logprobs is not None or submit.kind is RequestKind.SCORE
    of_prompt = logprob_bytes(num_prompt_tokens, 0, sampling.prompt_logprobs or 0) if scores else 0
    of_output = logprob_bytes(0, submit.max_tokens, sampling.logprobs or 0)
    num_ids = len(sampling.allowed_token_ids) + sum(2 + len(word) for word in sampling.bad_words)
    parameters = BIAS_BYTES * len(sampling.logit_bias) + TOKEN_ID_BYTES * num_ids
    return of_prompt + of_output + _NUM_SIDES * (parameters + STOP_TOKEN_BYTES * len(submit.stop_token_ids))
