"""Every failure a client can see, in OpenAI's envelope: one tree, one table.

    ApiError
    ├── InvalidRequest            400, with the field's name and one of OpenAI's code strings
    ├── ModelNotFound             404
    ├── RequestNotFound           404, nothing to cancel
    ├── BodyTimeout               408
    ├── BodyTooLarge              413
    ├── UnsupportedMediaType      415
    ├── ClientDisconnected        499, which nobody reads
    └── Interrupted               503, the answer was cut short by the server

Owns: this tree, and ``describe``, the only place that decides status, type, code and text of an error, whoever
raised it: this room, the engine's client, the text room, the web framework, or nobody on purpose.

Invariants: the body is ``{"error": {"message", "type", "param", "code"}}`` with a string code; it never repeats
input (a field's name is cleaned and cut) and never says more of an unexpected error than that there was one.
429 and 503 carry Retry-After.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException

from mixtral_serve.engine.errors import (
    EngineUnavailable,
    MemoryPressure,
    PromptTooLong,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestRefused,
    TokenOutOfRange,
)
from mixtral_serve.text.errors import ChatTemplateError

_MAX_NAME_CHARS: Final = 64
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.\-\[\]]")
INVALID_REQUEST: Final = "invalid_request_error"
UNEXPECTED: Final = "internal_error"
"""The code of what nobody raised on purpose."""


class ApiError(Exception):
    """Root of what this room raises on purpose."""


class InvalidRequest(ApiError):
    """A 400. ``param`` names the field, ``code`` is one of OpenAI's strings, the message never quotes input."""

    def __init__(self, message: str, *, param: str | None, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(ApiError):
    """No model is served under the name that was asked for."""


class RequestNotFound(ApiError):
    """No request of the caller's is under way under the id that was given."""


class BodyTimeout(ApiError):
    """The body did not arrive in time."""


class BodyTooLarge(ApiError):
    """The body has more than ``limit_bytes``."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class UnsupportedMediaType(ApiError):
    """The body is not plain JSON."""


class ClientDisconnected(ApiError):
    """The client left before its answer was there."""


class Interrupted(ApiError):
    """An accepted request was ended by the server before its answer was complete."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The envelope as JSON."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def all_headers(self) -> dict[str, str]:
        """Headers of the answer, Retry-After included."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def clean_name(name: str) -> str:
    """A field's name as a client spelled it, fit to be shown: short, and of harmless characters only."""
    return _NOT_IN_NAMES.sub("?", name[:_MAX_NAME_CHARS])


def describe(error: BaseException) -> Problem:
    """The problem that a client is told of for ``error``."""
    for kind, problem_of in _TABLE:
        if isinstance(error, kind):
            return problem_of(error)
    return Problem(500, "server_error", UNEXPECTED, "The server had an error while processing your request.")


def _http_problem(error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return Problem(404, INVALID_REQUEST, "unknown_url", "There is no such route.", headers=headers)
    if error.status_code == 405:
        return Problem(405, INVALID_REQUEST, "method_not_allowed", "The route has another method.", headers=headers)
    if error.status_code < 500:
        return Problem(error.status_code, INVALID_REQUEST, "invalid_request", "The request is not valid.")
    return Problem(error.status_code, "server_error", UNEXPECTED, "The server had an error.")


def _too_long(error: PromptTooLong) -> Problem:
    # The parameter is refined by the route, which knows where the prompt came from.
    return Problem(400, INVALID_REQUEST, "context_length_exceeded", str(error), "prompt")


def _failed(error: RequestFailed) -> Problem:
    if not error.is_retryable:
        return Problem(500, "server_error", "generation_failed", "The model failed on this request.")
    return Problem(503, "service_unavailable_error", "interrupted", f"{error}.", retry_after_s=_RETRY_AFTER_FAILURE_S)


_RETRY_AFTER_FAILURE_S: Final = 5.0
_SHORT: Final = "The server is short of memory. Try again later."
_TABLE: Final[tuple[tuple[type[BaseException], Callable[[Any], Problem]], ...]] = (
    (InvalidRequest, lambda e: Problem(400, INVALID_REQUEST, e.code, str(e), e.param)),
    (ModelNotFound, lambda e: Problem(404, INVALID_REQUEST, "model_not_found", str(e), "model")),
    (RequestNotFound, lambda e: Problem(404, INVALID_REQUEST, "request_not_found", str(e))),
    (BodyTimeout, lambda _: Problem(408, INVALID_REQUEST, "request_timeout", "The request body came too slowly.")),
    (BodyTooLarge, lambda e: Problem(413, INVALID_REQUEST, "request_too_large", f"Refused: {e}.")),
    (UnsupportedMediaType, lambda e: Problem(415, INVALID_REQUEST, "unsupported_media_type", str(e))),
    (ClientDisconnected, lambda _: Problem(499, INVALID_REQUEST, "client_disconnected", "The client has left.")),
    (PromptTooLong, _too_long),
    (TokenOutOfRange, lambda e: Problem(400, INVALID_REQUEST, "invalid_value", f"'{e.param}': {e}.", e.param)),
    (
        QueueFull,
        lambda e: Problem(
            429, "rate_limit_error", "rate_limit_exceeded", f"{e}. Try again later.", retry_after_s=e.retry_after_s
        ),
    ),
    (RequestRefused, lambda e: Problem(400, INVALID_REQUEST, "invalid_value", f"The request was refused: {e}.")),
    (
        MemoryPressure,
        lambda e: Problem(503, "service_unavailable_error", "memory_pressure", _SHORT, retry_after_s=e.retry_after_s),
    ),
    (
        EngineUnavailable,
        lambda e: Problem(
            503, "service_unavailable_error", "server_is_overloaded", f"{e}.", retry_after_s=e.retry_after_s
        ),
    ),
    (
        Interrupted,
        lambda e: Problem(
            503, "service_unavailable_error", "interrupted", f"{e}.", retry_after_s=_RETRY_AFTER_FAILURE_S
        ),
    ),
    (RequestCancelled, lambda e: Problem(400, INVALID_REQUEST, "request_cancelled", f"{e}.")),
    (RequestFailed, _failed),
    (ChatTemplateError, lambda e: Problem(400, INVALID_REQUEST, "invalid_value", f"'messages': {e}.", "messages")),
    (HTTPException, _http_problem),
)
