"""The engine's exception tree, as the API process sees it.

    EngineError
    ├── RequestRefused            refused before anything was computed
    │   ├── PromptTooLong             prompt (and explicit max_tokens) beyond what one request may hold
    │   ├── TokenOutOfRange           a token id the model does not have
    │   └── QueueFull                 too many requests wait; try again later
    ├── EngineUnavailable         the server's own state: loading, restarting, draining, dead
    │   └── MemoryPressure            memory is nearly used up; requests are taken again when there is some
    ├── EngineStartError          the engine cannot start as configured; a restart would not help
    ├── RequestCancelled          accepted, then cancelled by another call
    └── RequestFailed             accepted, then ended by an error or by the death of the engine

The texts are for logs and may be shown to clients: they name no path, address or input text.
"""

from __future__ import annotations

from typing import Final

EXIT_CONFIG: Final = 78
"""Exit code of an engine that cannot start as configured (``EX_CONFIG``); restarting would not help."""

PRESSURE_RETRY_AFTER_S: Final = 10.0
"""A running request or two have ended by then, and what can be given back has been."""


class EngineError(Exception):
    """Root of what the engine raises at its clients."""


class RequestRefused(EngineError):
    """Refused before anything was computed."""


class PromptTooLong(RequestRefused):
    """Prompt, or prompt plus explicitly asked output, beyond the limit.

    All numbers are tokens; ``max_tokens`` is None where the prompt alone is too long.
    """

    def __init__(self, num_prompt_tokens: int, max_tokens: int | None, limit: int) -> None:
        output = "" if max_tokens is None else f" and {max_tokens} in the completion"
        super().__init__(
            f"This model's maximum context length is {limit} tokens. "
            f"However, you requested {num_prompt_tokens} tokens in the prompt{output}."
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.limit = limit


class TokenOutOfRange(RequestRefused):
    """A token id outside the vocabulary. ``param`` names the request's field."""

    def __init__(self, param: str, token_id: int, vocab_size: int) -> None:
        super().__init__(f"token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})")
        self.param = param


class QueueFull(RequestRefused):
    """Too many requests are waiting, or those that live leave no memory for another one's structures."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"the queue is full (it takes {limit} requests, fewer if they are large)")
        self.retry_after_s = retry_after_s


class EngineUnavailable(EngineError):
    """The server cannot take requests now. ``reason``: loading, restarting, draining or dead."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(f"the engine is not available: {reason}")
        self.reason = reason
        self.retry_after_s = retry_after_s


class MemoryPressure(EngineUnavailable):
    """Memory is nearly used up although all was planned; new requests wait until some was given back."""

    def __init__(self, retry_after_s: float = PRESSURE_RETRY_AFTER_S) -> None:
        super().__init__("memory pressure", retry_after_s)


class EngineStartError(EngineError):
    """The engine cannot start as it is configured: a bad checkpoint, a plan that does not fit.

    The code that builds the engine raises it in the engine process; the client raises it again in the API
    process. ``message`` is one line for the operator and may name a file.
    """

    def __init__(self, message: str, exit_code: int = EXIT_CONFIG) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


class RequestCancelled(EngineError):
    """An accepted request that somebody else than its reader cancelled."""

    def __init__(self) -> None:
        super().__init__("The request was cancelled by its id")


class RequestFailed(EngineError):
    """An accepted request ended by an error, or the engine died under it.

    ``detail`` is for the log and not for clients. ``is_retryable``: the engine died or is shutting down, and the
    request itself is not to blame.
    """

    def __init__(self, message: str, *, detail: str = "", is_retryable: bool = False) -> None:
        super().__init__(message)
        self.detail = detail
        self.is_retryable = is_retryable
