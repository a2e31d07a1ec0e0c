"""The shapes of answers: chat completions and text completions, whole and in chunks.

Owns: ``ChatFormat`` and ``CompletionFormat``, both an ``AnswerFormat``: bytes for streams, plain values for whole
answers.

A stream's chunks differ in a few bytes only: the rest is encoded once per stream and the chunk is put together
from pieces. Rejected: a pydantic model per chunk, some thirty times slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mixtral_serve.api.convert import Choice, finish_reason
from mixtral_serve.api.sse import json_line
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.detokenizer import TokenBytes
from scheduler.events import TokenLogprob

_MIN_LOGPROB: Final = -9999.0
"""JSON has no minus infinity; this is what OpenAI says instead."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all parts of one answer carry."""

    id: str
    created: int
    """Unix time, seconds."""
    model: str
    system_fingerprint: str


class AnswerFormat(Protocol):
    """How one endpoint spells its answers."""

    def opening(self, index: int) -> bytes:
        """Events that precede a choice's first delta."""
        ...

    def chunk(self, index: int, delta: Delta) -> bytes:
        """Events for one delta; empty when it shows nothing."""
        ...

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """The event with the token counts, after all choices."""
        ...

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """The whole answer."""
        ...


class _Chunks:
    """The constant parts of a stream's chunks."""

    def __init__(self, head: AnswerHead, object_name: str, *, include_usage: bool) -> None:
        constant = json_line(_head_fields(head, object_name))
        self._before = b"data: " + constant[:-1] + b',"choices":['
        # With include_usage every chunk has the field, null but for the last.
        self._after = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def event(self, choice: bytes) -> bytes:
        return self._before + choice + self._after

    def usage(self, usage: Mapping[str, object]) -> bytes:
        return self._before + b'],"usage":' + json_line(usage) + b"}\n\n"


def _head_fields(head: AnswerHead, object_name: str) -> dict[str, object]:
    return {
        "id": head.id,
        "object": object_name,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


class ChatFormat:
    """Chat completions: a role first, then content, then one finish reason per choice."""

    def __init__(self, head: AnswerHead, table: TokenBytes, *, include_usage: bool) -> None:
        self._head = head
        self._table = table
        self._chunks = _Chunks(head, "chat.completion.chunk", include_usage=include_usage)

    def opening(self, index: int) -> bytes:
        """See ``AnswerFormat``."""
        return self._chunks.event(
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        )

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See ``AnswerFormat``."""
        reason = finish_reason(delta)
        data = b""
        if delta.text or delta.logprobs:
            logprobs = json_line(self._logprobs(delta.logprobs)) if delta.logprobs else b"null"
            data = self._chunks.event(
                b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}'
                % (index, json_line(delta.text), logprobs)
            )
        if reason is not None:
            data += self._chunks.event(
                b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}' % (index, reason.encode())
            )
        return data

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        return self._chunks.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """See ``AnswerFormat``."""
        return _head_fields(self._head, "chat.completion") | {
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs) if choice.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        return {
            "content": [
                self._token(entry.token_id, entry.logprob)
                | {"top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top]}
                for entry in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, object]:
        piece = self._table[token_id]
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": max(logprob, _MIN_LOGPROB),
            "bytes": list(piece),
        }


class CompletionFormat:
    """Text completions: text and finish reason side by side."""

    def __init__(self, head: AnswerHead, table: TokenBytes, *, include_usage: bool) -> None:
        self._head = head
        self._table = table
        self._chunks = _Chunks(head, "text_completion", include_usage=include_usage)
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def opening(self, index: int) -> bytes:
        """See ``AnswerFormat``."""
        del index  # the text comes without a preamble
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See ``AnswerFormat``."""
        reason = finish_reason(delta)
        if not delta.text and not delta.logprobs and reason is None:
            return b""
        logprobs = json_line(self._logprobs(delta.logprobs, index)) if delta.logprobs else b"null"
        return self._chunks.event(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (index, json_line(delta.text), logprobs, b"null" if reason is None else b'"%b"' % reason.encode())
        )

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        return self._chunks.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """See ``AnswerFormat``."""
        return _head_fields(self._head, "text_completion") | {
            "choices": [
                {
                    "index": index,
                    "text": choice.text,
                    "logprobs": self._logprobs(choice.logprobs, index) if choice.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob], index: int) -> dict[str, object]:
        """``text_offset`` counts the characters of the tokens before, over all chunks of the choice."""
        tokens = [self._text(entry.token_id) for entry in logprobs]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, _MIN_LOGPROB) for entry in logprobs],
            "top_logprobs": [
                {self._text(token_id): max(logprob, _MIN_LOGPROB) for token_id, logprob in entry.top}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        return self._table[token_id].decode("utf-8", "replace")
