"""The shapes of answers: what all have in common, and chat completions, whole and in chunks.

Owns: ``AnswerFormat`` (bytes for streams, plain values for whole answers), ``Extras``, ``Chunks`` and ``ChatFormat``.
Text completions are in ``completion_format``, log-probabilities in ``logprobs``.

A stream's chunks differ in a few bytes only: the rest is encoded once per stream and the chunk is put together
from pieces. Rejected: a pydantic model per chunk, some thirty times slower.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from mixtral_serve.api.convert import Choice, finish_reason
from mixtral_serve.api.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from mixtral_serve.api.schemas.common import GenerationRequest, StreamOptions
from mixtral_serve.api.sse import json_line
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.detokenizer import TokenBytes


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all parts of one answer carry."""

    id: str
    created: int
    """Unix time, seconds."""
    model: str
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an answer tells besides the text, because the request asked for it."""

    include_usage: bool = False
    continuous_usage: bool = False
    """Token counts in every chunk."""
    token_ids: bool = False
    tokens_as_ids: bool = False
    """Log-probabilities name tokens by their ids."""
    prompt_logprobs: int | None = None
    """Alternatives at each position of the prompt; None: say nothing of it."""
    prompts: tuple[array[int], ...] = ()
    n: int = 1
    """Choices of each prompt."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Further fields of the answer and of every chunk."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """A whole answer's field; left out where it is empty."""

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        prompts: tuple[array[int], ...],
        *,
        fields: Mapping[str, object] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """What ``request`` asks for."""
        options = request.stream_options or StreamOptions()
        return cls(
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
            token_ids=request.return_token_ids,
            tokens_as_ids=request.return_tokens_as_token_ids,
            prompt_logprobs=request.prompt_logprobs,
            prompts=prompts,
            n=request.n,
            fields=fields or {},
            metadata=metadata or {},
        )

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


class AnswerFormat(Protocol):
    """How one endpoint spells its answers."""

    def opening(self, index: int) -> bytes:
        """Events that precede a choice's first delta."""
        ...

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Events for one delta; empty when it shows nothing."""
        ...

    def progress(self, index: int, progress: Mapping[str, object]) -> bytes:
        """The event that tells how far a choice's prompt has come."""
        ...

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """The event with the token counts, after all choices."""
        ...

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """The whole answer."""
        ...


class Chunks:
    """The constant parts of a stream's chunks, and the counts of what was sent."""

    def __init__(self, head: AnswerHead, object_name: str, extras: Extras) -> None:
        constant = json_line({**head_fields(head, object_name), **extras.fields})
        self._before = b"data: " + constant[:-1] + b',"choices":['
        self._counts = extras.include_usage and extras.continuous_usage
        self._num_prompt_tokens = extras.num_prompt_tokens
        self._num_output_tokens = 0
        # With include_usage every chunk has the field, null but for the last.
        self._usage = b',"usage":null' if extras.include_usage else b""

    def count(self, delta: Delta) -> None:
        """The next event tells of this delta's tokens too."""
        self._num_output_tokens += len(delta.token_ids)

    def event(self, choice: bytes, more: bytes = b"") -> bytes:
        """One chunk; ``more`` is JSON members of the chunk, each with a comma before it."""
        usage = self._usage
        if self._counts:
            num_prompt_tokens, num_output_tokens = self._num_prompt_tokens, self._num_output_tokens
            usage = b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
                num_prompt_tokens,
                num_output_tokens,
                num_prompt_tokens + num_output_tokens,
            )
        return self._before + choice + b"]" + more + usage + b"}\n\n"

    def usage(self, usage: Mapping[str, object]) -> bytes:
        """The last chunk."""
        return self._before + b'],"usage":' + json_line(usage) + b"}\n\n"


def head_fields(head: AnswerHead, object_name: str) -> dict[str, object]:
    """What an answer begins with."""
    return {
        "id": head.id,
        "object": object_name,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


class Speech(Protocol):
    """What an answer's text becomes in the message: content, or calls of functions (``api.tools``)."""

    opening: bytes
    """JSON of a stream's first ``delta``."""
    silence: bytes
    """JSON of a ``delta`` without text, where there is something else to tell."""

    def parts(self, index: int, delta: Delta) -> list[bytes]:
        """JSON of each ``delta`` that the choice's next text makes."""
        ...

    def ending(self, index: int, reason: str) -> str:
        """The finish reason, after all parts."""
        ...

    def message(self, choice: Choice) -> tuple[dict[str, object], str | None]:
        """The whole message and the finish reason."""
        ...


class PlainSpeech:
    """The text is the content."""

    opening = b'{"role":"assistant","content":""}'
    silence = b'{"content":""}'

    def parts(self, index: int, delta: Delta) -> list[bytes]:
        """See ``Speech``."""
        del index
        return [b'{"content":%b}' % json_line(delta.text)] if delta.text else []

    def ending(self, index: int, reason: str) -> str:
        """See ``Speech``."""
        del index
        return reason

    def message(self, choice: Choice) -> tuple[dict[str, object], str | None]:
        """See ``Speech``."""
        return {"role": "assistant", "content": choice.text, "refusal": None}, choice.finish_reason


class ChatFormat:
    """Chat completions: a role first, then content or calls, then one finish reason per choice."""

    def __init__(self, head: AnswerHead, table: TokenBytes, extras: Extras, speech: Speech | None = None) -> None:
        self._head = head
        self._speech = speech or PlainSpeech()
        self._extras = extras
        self._names = TokenNames(table, as_ids=extras.tokens_as_ids)
        self._chunks = Chunks(head, "chat.completion.chunk", extras)

    def opening(self, index: int) -> bytes:
        """See ``AnswerFormat``."""
        more = b""
        if self._extras.token_ids and index == 0:
            more = b',"prompt_token_ids":' + json_line(self._extras.prompts[0].tolist())
        return self._chunks.event(
            b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}' % (index, self._speech.opening), more
        )

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See ``AnswerFormat``."""
        reason = finish_reason(delta)
        self._chunks.count(delta)
        data = ids = b""
        if self._extras.token_ids and delta.token_ids:
            ids = b',"token_ids":' + json_line(delta.token_ids)
        logprobs = json_line(chat_logprobs(self._names, delta.logprobs)) if delta.logprobs else b"null"
        parts = self._speech.parts(index, delta)
        if not parts and (delta.logprobs or ids):
            parts = [self._speech.silence]
        for part in parts:
            data += self._chunks.event(
                b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}' % (index, part, logprobs, ids)
            )
            logprobs, ids = b"null", b""
        if reason is not None:
            ending = self._speech.ending(index, reason)
            data += self._chunks.event(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}' % (index, ending.encode())
            )
        return data

    def progress(self, index: int, progress: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        choice = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":null}' % index
        return self._chunks.event(choice, b',"prompt_progress":' + json_line(progress))

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        return self._chunks.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """See ``AnswerFormat``."""
        extras = self._extras
        answer = head_fields(self._head, "chat.completion") | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage,
            **extras.fields,
        }
        if extras.metadata:
            answer["metadata"] = dict(extras.metadata)
        if extras.token_ids:
            answer["prompt_token_ids"] = extras.prompts[0].tolist()
        if extras.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self._names, choices[0].prompt_logprobs, num_top=extras.prompt_logprobs
            )
        return answer

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        message, reason = self._speech.message(choice)
        value: dict[str, object] = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._names, choice.logprobs) if choice.logprobs else None,
            "finish_reason": reason,
        }
        if self._extras.token_ids:
            value["token_ids"] = choice.token_ids
        return value
