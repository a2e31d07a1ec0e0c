"""The shape of text completions, whole and in chunks.

Owns: ``CompletionFormat``, an ``AnswerFormat``.

With ``echo`` a choice begins with its prompt: in a stream as an event before the first delta, whose log-probabilities
follow as the prompt is computed. The text repeated is the decoding of the prompt's tokens, however the prompt was
given, so that text and offsets agree, and a truncated prompt is repeated as it was used.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from mixtral_serve.api.convert import Choice, finish_reason
from mixtral_serve.api.formats import AnswerHead, Chunks, Extras, head_fields
from mixtral_serve.api.logprobs import TextOffsets, TokenNames, completion_logprobs, prompt_logprobs
from mixtral_serve.api.sse import json_line
from mixtral_serve.engine.messages import Delta
from mixtral_serve.text.detokenizer import IncrementalDetokenizer, TokenBytes
from scheduler.events import TokenLogprob


class CompletionFormat:
    """Text completions: text and finish reason side by side."""

    def __init__(
        self,
        head: AnswerHead,
        table: TokenBytes,
        extras: Extras,
        *,
        logprobs: int | None,
        echoes: Sequence[str] | None,
        skip_special_tokens: bool,
    ) -> None:
        """``logprobs``: alternatives per token, None for no log-probabilities. ``echoes``: the prompts' texts, where
        they are to be repeated.
        """
        self._head = head
        self._table = table
        self._extras = extras
        self._num_top = logprobs
        self._echoes = echoes
        self._skip_special_tokens = skip_special_tokens
        self._names = TokenNames(table, as_ids=extras.tokens_as_ids)
        self._chunks = Chunks(head, "text_completion", extras)
        self._offsets: dict[int, TextOffsets] = {}

    def opening(self, index: int) -> bytes:
        """See ``AnswerFormat``."""
        more = self._ids("prompt_token_ids", self._prompt(index)) if self._extras.token_ids else b""
        if self._echoes is None and not more:
            return b""  # the text comes without a preamble
        first = None if self._echoes is None else self._prompt(index)[0]
        logprobs = b"null"
        if first is not None and self._num_top is not None:
            logprobs = json_line(self._logprobs(index, (), first=first))
        return self._chunks.event(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null%b}'
            % (index, json_line(self._echo(index)), logprobs, more)
        )

    def chunk(self, index: int, delta: Delta) -> bytes:
        """See ``AnswerFormat``."""
        reason = finish_reason(delta)
        self._chunks.count(delta)
        entries = (*delta.prompt_logprobs, *delta.logprobs) if self._echoes is not None else delta.logprobs
        more = self._ids("token_ids", delta.token_ids) if self._extras.token_ids and delta.token_ids else b""
        if not delta.text and not entries and not more and reason is None:
            return b""
        logprobs = json_line(self._logprobs(index, entries)) if entries else b"null"
        return self._chunks.event(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}'
            % (index, json_line(delta.text), logprobs, b"null" if reason is None else b'"%b"' % reason.encode(), more)
        )

    def progress(self, index: int, progress: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        choice = b'{"index":%d,"text":"","logprobs":null,"finish_reason":null}' % index
        return self._chunks.event(choice, b',"prompt_progress":' + json_line(progress))

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """See ``AnswerFormat``."""
        return self._chunks.usage(usage)

    def answer(self, choices: Sequence[Choice], usage: Mapping[str, object]) -> dict[str, object]:
        """See ``AnswerFormat``."""
        return head_fields(self._head, "text_completion") | {
            "choices": [
                self._choice(index, choice, choices[index - index % self._extras.n])
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
            **self._extras.fields,
        }

    def _choice(self, index: int, choice: Choice, scored: Choice) -> dict[str, object]:
        """``scored`` is the sibling that has the prompt's log-probabilities."""
        extras = self._extras
        entries, first = choice.logprobs, None
        if self._echoes is not None:
            entries, first = scored.prompt_logprobs + entries, self._prompt(index)[0]
        has_logprobs = self._num_top is not None and (entries or first is not None)
        value: dict[str, object] = {
            "index": index,
            "text": self._echo(index) + choice.text,
            "logprobs": self._logprobs(index, entries, first=first) if has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if extras.token_ids:
            value |= {"prompt_token_ids": self._prompt(index).tolist(), "token_ids": choice.token_ids}
        if extras.prompt_logprobs is not None:
            value["prompt_logprobs"] = prompt_logprobs(
                self._names, scored.prompt_logprobs, num_top=extras.prompt_logprobs
            )
        return value

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob], *, first: int | None = None) -> dict[str, object]:
        """The next entries of a choice: its offsets go on where the last ones ended."""
        offsets = self._offsets.get(index)
        if offsets is None:
            # A text that begins with its prompt begins as prompts do, without the space that encoding adds.
            detokenizer = IncrementalDetokenizer(
                self._table,
                skip_special_tokens=self._skip_special_tokens,
                strip_leading_space=self._echoes is not None,
            )
            offsets = self._offsets[index] = TextOffsets(detokenizer)
        return completion_logprobs(self._names, offsets, entries, num_top=self._num_top or 0, first=first)

    def _prompt(self, index: int) -> array[int]:
        return self._extras.prompts[index // self._extras.n]

    def _echo(self, index: int) -> str:
        return "" if self._echoes is None else self._echoes[index // self._extras.n]

    @staticmethod
    def _ids(name: str, ids: Sequence[int]) -> bytes:
        return b',"%b":%b' % (name.encode(), json_line(list(ids)))
