"""One streamed completion, timed: what a load test does many times.

Owns: ``CompletionsClient`` and ``Outcome``. Speaks ``POST /v1/completions`` with token ids, to any server that
has OpenAI's API.

Invariants: ``complete`` never raises for what a server does: every call comes to one ``Outcome``, and whatever
is not a whole, well-formed answer with exactly the tokens asked for is an error with a kind. Times count from the
moment the request was *due*, not from when it was sent: a generator that falls behind must not make the server
look fast.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from bench.http_client import ExchangeError, Target, exchange
from bench.sse import EventDecoder, EventTooLarge

_MAX_ERROR_BYTES: Final = 2048


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times in seconds, from the moment it was due."""

    due_s: float
    """Monotonic time."""
    send_lag_s: float = 0.0
    """How late it was sent: the load generator's own fault."""
    ttft_s: float | None = None
    """To the first chunk with text."""
    e2e_s: float = 0.0
    """To the end of the answer, or to the failure."""
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    """Between chunks with text."""
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    """The kind of failure; None where everything was as it should be."""
    detail: str = ""


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_chunk: Final = msgspec.json.Decoder(_Chunk).decode


class _BadAnswer(Exception):
    """The answer is complete as HTTP and wrong as a completion."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class _Reader:
    """Reads one answer as it comes in and notes when."""

    __slots__ = ("_clock", "_events", "_last_s", "_outcome", "error_body", "is_done", "is_finished", "usage")

    def __init__(self, outcome: Outcome, clock: Callable[[], float]) -> None:
        self._outcome = outcome
        self._clock = clock
        self._events = EventDecoder()
        self._last_s = 0.0
        self.error_body = b""
        self.usage: _Usage | None = None
        self.is_finished = False
        self.is_done = False

    def read(self, status: int, piece: bytes) -> None:
        """A piece of the body."""
        if status != 200:
            self.error_body = (self.error_body + piece)[:_MAX_ERROR_BYTES]
            return
        now = self._clock()
        for data in self._events.feed(piece):
            if data == b"[DONE]":
                self.is_done = True
            else:
                self._read_chunk(_decode_chunk(data), now)

    def _read_chunk(self, chunk: _Chunk, now: float) -> None:
        if chunk.error:
            raise _BadAnswer("stream_error", str(chunk.error)[:_MAX_ERROR_BYTES])
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.text:
                self._note_text(now)
            if choice.finish_reason is not None:
                self.is_finished = True

    def _note_text(self, now: float) -> None:
        outcome = self._outcome
        if outcome.ttft_s is None:
            outcome.ttft_s = now - outcome.due_s
        else:
            outcome.gaps_s.append(now - self._last_s)
        self._last_s = now


class CompletionsClient:
    """Asks one server for streamed completions of one model."""

    def __init__(
        self,
        target: Target,
        *,
        model: str,
        api_key: str | None = None,
        extra: Mapping[str, object] | None = None,
        timeout_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``extra`` fields go into each request, over those that stand there otherwise."""
        self._target = target
        self._headers = authorization(api_key)
        self._constant = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            **(extra or {}),
        }
        self._timeout_s = timeout_s
        self._clock = clock

    async def complete(self, prompt: list[int], output_tokens: int, *, due_s: float | None = None) -> Outcome:
        """Ask for exactly ``output_tokens`` tokens after ``prompt``. ``due_s``: monotonic time, now by default."""
        now = self._clock()
        outcome = Outcome(now if due_s is None else due_s)
        body = msgspec.json.encode({**self._constant, "prompt": prompt, "max_tokens": output_tokens})
        request = self._target.request("POST", "/v1/completions", body, self._headers)
        reader = _Reader(outcome, self._clock)
        outcome.send_lag_s = max(0.0, self._clock() - outcome.due_s)
        try:
            head = await exchange(self._target, request, reader.read, timeout_s=self._timeout_s)
            _judge(reader, head.status, output_tokens, outcome)
        except (ExchangeError, _BadAnswer) as error:
            outcome.error, outcome.detail = error.kind, str(error)
        except (msgspec.MsgspecError, EventTooLarge) as error:
            outcome.error, outcome.detail = "malformed", str(error)
        outcome.e2e_s = self._clock() - outcome.due_s
        return outcome


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _judge(reader: _Reader, status: int, output_tokens: int, outcome: Outcome) -> None:
    """Fill in the counts, or raise for an answer that is not what was asked for."""
    if status != 200:
        raise _BadAnswer(f"http_{status}", reader.error_body.decode("utf-8", "replace"))
    if not reader.is_done:
        raise _BadAnswer("incomplete", "the stream ended without [DONE]")
    if not reader.is_finished:
        raise _BadAnswer("incomplete", "no chunk has a finish reason")
    if reader.usage is None:
        raise _BadAnswer("no_usage", "no chunk has the token counts")
    if reader.usage.completion_tokens != output_tokens:
        raise _BadAnswer("wrong_token_count", f"{reader.usage.completion_tokens} tokens instead of {output_tokens}")
    if outcome.ttft_s is None:
        raise _BadAnswer("no_text", "no chunk has text")
    outcome.num_output_tokens = output_tokens
    details = reader.usage.prompt_tokens_details
    outcome.num_cached_tokens = (details.cached_tokens or 0) if details is not None else 0


async def first_model(target: Target, api_key: str | None, *, timeout_s: float = 30.0) -> str:
    """The first model that the server lists.

    Raises:
        ExchangeError: no answer.
        ValueError: an answer without a model; the message says what came instead.
    """
    body = bytearray()
    request = target.request("GET", "/v1/models", headers=authorization(api_key))
    head = await exchange(target, request, lambda _, piece: body.extend(piece), timeout_s=timeout_s)
    if head.status != 200:
        raise ValueError(f"GET /v1/models answered {head.status}: {bytes(body[:200]).decode('utf-8', 'replace')}")
    try:
        models = msgspec.json.decode(bytes(body), type=_Models).data
    except msgspec.MsgspecError as error:
        raise ValueError(f"GET /v1/models did not answer with a list of models: {error}") from error
    if not models:
        raise ValueError("the server lists no model")
    return models[0].id
