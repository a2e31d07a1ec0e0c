"""What is refused before it costs the engine anything, and how long the refused should wait.

Owns: the early checks on a ``Submit`` (run in the API process, synchronously, so that the answer is a status
code and not a broken stream), the resolution of ``max_tokens``, and the honest ``Retry-After``.

Invariants: the limit is the scheduler's own formula, ``SchedulerConfig.max_tokens_per_request``; what passes
here is refused by the engine only if the queue filled up in between. All functions are pure; ``FinishRate``
holds a few numbers and is told the time.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.errors import PromptTooLong, TokenOutOfRange
from mixtral_serve.engine.messages import EngineStats, Submit
from mixtral_serve.engine.parameters import check_parameters
from scheduler.config import SchedulerConfig
from scheduler.request import TOKEN_TYPECODE

COMPLETION_DEFAULT_MAX_TOKENS: Final = 16
"""What OpenAI's completions endpoint generates when the client does not say."""

MIN_RETRY_AFTER_S: Final = 1.0
MAX_RETRY_AFTER_S: Final = 120.0
"""Official clients do not wait longer than this."""
_UNKNOWN_RETRY_AFTER_S: Final = 5.0


def limit_for(info: ModelInfo) -> int:
    """Tokens (prompt and output) that one request may hold on this engine."""
    return SchedulerConfig(
        num_blocks=info.num_blocks, block_size=info.block_size, max_model_len=info.max_model_len
    ).max_tokens_per_request


def resolve_max_tokens(info: ModelInfo, num_prompt_tokens: int, asked: int | None, *, default: int | None) -> int:
    """The ``max_tokens`` of a GENERATE request.

    An explicit ``asked`` is kept or refused, never cut; with 0 the prompt may fill the whole limit. Without one,
    ``default`` (None: all that is left) is cut to what is left beside the prompt.

    Raises:
        PromptTooLong: the prompt leaves no room for a token, or not for ``asked`` tokens.
    """
    limit = limit_for(info)
    left = limit - num_prompt_tokens
    if left < (0 if asked == 0 else 1):
        raise PromptTooLong(num_prompt_tokens, None, limit)
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise PromptTooLong(num_prompt_tokens, asked, limit)
    return asked


def decode_prompt(prompt: bytes) -> array[int]:
    """Token ids of ``Submit.prompt``.

    Raises:
        ValueError: the length is not a whole number of ids.
    """
    tokens = array(TOKEN_TYPECODE)
    tokens.frombytes(prompt)
    return tokens


def check_token_ids(tokens: array[int], stop_token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Every id must be a row of the model's head.

    Raises:
        TokenOutOfRange: names the field and the first offender.
    """
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise TokenOutOfRange("prompt", next(t for t in tokens if not 0 <= t < vocab_size), vocab_size)
    for token_id in stop_token_ids:
        if not 0 <= token_id < vocab_size:
            raise TokenOutOfRange("stop_token_ids", token_id, vocab_size)


def check_size(submit: Submit, num_prompt_tokens: int, limit: int) -> None:
    """Prompt, and prompt plus output, must fit into what one request may hold.

    Raises:
        PromptTooLong: says which of the two it was.
    """
    if num_prompt_tokens + min(submit.max_tokens, 1) > limit:
        raise PromptTooLong(num_prompt_tokens, None, limit)
    if num_prompt_tokens + submit.max_tokens > limit:
        raise PromptTooLong(num_prompt_tokens, submit.max_tokens, limit)


def check_submits(requests: Sequence[Submit], info: ModelInfo) -> None:
    """All checks that depend on the model alone. Equal prompts (the ``n`` choices of a call) are read once.

    Raises:
        PromptTooLong, TokenOutOfRange: one of the requests can never be served.
    """
    limit = limit_for(info)
    for submit in requests:
        check_size(submit, len(submit.prompt) // array(TOKEN_TYPECODE).itemsize, limit)
    for prompt, stop_token_ids in {(submit.prompt, submit.stop_token_ids) for submit in requests}:
        check_token_ids(decode_prompt(prompt), stop_token_ids, info.vocab_size)
    # Apart from their number the choices of a call have the same parameters.
    for sampling in {replace(submit.sampling, choice=0, seed=0) for submit in requests}:
        check_parameters(sampling, info.vocab_size)


def num_waiting(stats: EngineStats, num_live: int, max_num_seqs: int) -> int:
    """Requests that wait, counting those submitted since the engine last reported.

    ``num_live`` is exact; how many of them run is as of ``stats``. While nothing waited there, newcomers are
    taken to find a seat, so that a burst on an idle engine is not refused.
    """
    num_running = stats.num_running if stats.num_waiting else max_num_seqs
    return max(0, num_live - num_running)


class FinishRate:
    """How fast requests end, and what that means for those who are sent away.

    Each refused request is told a later time than the one before: the first place to become free goes to the
    first, the second to the second, so that the refused do not all come back at once.
    """

    __slots__ = ("_ends_s", "_num_refused")

    def __init__(self, window: int = 64) -> None:
        self._ends_s: deque[float] = deque(maxlen=window)
        self._num_refused = 0

    def note_finished(self, now: float, count: int = 1) -> None:
        """``count`` requests ended at ``now`` (monotonic seconds)."""
        self._ends_s.extend([now] * count)
        self._num_refused = max(0, self._num_refused - count)

    def note_idle(self) -> None:
        """Nothing is left to do: what ended before says nothing of the requests to come."""
        self._ends_s.clear()

    def seconds_per_end(self, now: float) -> float | None:
        """Seconds between two ends, of late; None while too few were seen."""
        return (now - self._ends_s[0]) / len(self._ends_s) if len(self._ends_s) > 1 else None

    def retry_after_s(self, now: float) -> float:
        """Seconds after which the request refused at ``now`` can expect a place."""
        self._num_refused += 1
        seconds_per_end = self.seconds_per_end(now)
        if seconds_per_end is None:
            return _UNKNOWN_RETRY_AFTER_S
        return min(max(self._num_refused * seconds_per_end, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
