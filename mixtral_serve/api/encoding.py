"""Prompts to token ids without holding up the event loop.

Owns: ``PromptEncoder``. Short texts are encoded on the spot; long ones in one side thread (the tokenizer releases
the interpreter lock), one at a time, so that many of them at once cost time and not memory. A text that could
not fit the context however well it were encoded is refused before it is.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.admission import limit_for
from mixtral_serve.text.chat_format import ChatEncoder
from mixtral_serve.text.conversation import ChatMessage, Rendering
from mixtral_serve.text.tokenizer import Tokenizer
from mixtral_serve.text.tool_text import tools_text

_LONG_BYTES: Final = 8_192
"""A few milliseconds of tokenising at the most: longer requests go to the thread."""
_LONG_PROMPTS: Final = 2_048
"""The same for tokens to be turned into text."""

_ANSWERED: Final = Rendering()

T = TypeVar("T")


class PromptEncoder:
    """Encodes the prompts of all endpoints."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatEncoder | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        info: ModelInfo,
        *,
        how: Rendering = _ANSWERED,
        may_be_too_long: bool = False,
    ) -> array[int]:
        """Ids of a conversation. ``may_be_too_long``: it is cut afterwards.

        Raises:
            InvalidRequest: it cannot fit, its tools are nested too deeply, or the model has no chat template.
            ChatTemplateError: the template refuses it.
        """
        try:
            return await self._chat(messages, info, how, may_be_too_long)
        except RecursionError:  # tools are the only part that nests; those that are called have stricter limits
            raise InvalidRequest("'tools' are nested too deeply.", param="tools", code="invalid_value") from None

    async def _chat(
        self, messages: Sequence[ChatMessage], info: ModelInfo, how: Rendering, may_be_too_long: bool
    ) -> array[int]:
        template = self._chat_template
        if template is None:
            message = "The model has no chat template: use /v1/completions."
            raise InvalidRequest(message, param="messages", code="unsupported_parameter")
        texts = [message.content for message in messages]
        texts += [call.arguments for message in messages for call in message.calls]
        texts += [tools_text(how.tools)] if how.tools else []
        if not may_be_too_long:
            self._check_length(texts, info, "messages")
        return await self._encoded(
            texts,
            lambda: template.encode(
                messages,
                tools=how.tools,
                add_generation_prompt=how.add_generation_prompt,
                continue_final_message=how.continue_final_message,
            ),
        )

    async def texts(
        self,
        texts: Sequence[str],
        info: ModelInfo,
        *,
        param: str = "prompt",
        add_bos: bool = True,
        may_be_too_long: bool = False,
    ) -> list[array[int]]:
        """Ids of the texts in the field ``param``, each with the beginning-of-sequence token where ``add_bos`` asks
        for it. ``may_be_too_long``: they are cut afterwards.

        Raises:
            InvalidRequest: one of them cannot fit.
        """
        if not may_be_too_long:
            for text in texts:
                self._check_length([text], info, param)
        return await self._encoded(texts, lambda: [self._tokenizer.encode(text, add_bos=add_bos) for text in texts])

    async def decoded(self, prompts: Sequence[array[int]], *, skip_special_tokens: bool) -> list[str]:
        """The texts of ``prompts``, in the side thread if they are long."""

        def decode() -> list[str]:
            return [self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in prompts]

        return await self._decoded(sum(map(len, prompts)), decode)

    async def pieces(self, ids: array[int]) -> list[str]:
        """The text of each token, U+FFFD for what is none, in the side thread if there are many."""
        table = self._tokenizer.token_bytes
        return await self._decoded(len(ids), lambda: [table[token_id].decode("utf-8", "replace") for token_id in ids])

    async def _decoded(self, num_tokens: int, decode: Callable[[], T]) -> T:
        if num_tokens <= _LONG_PROMPTS:
            return decode()
        return await asyncio.get_running_loop().run_in_executor(self._thread, decode)

    async def _encoded(self, texts: Sequence[str], encode: Callable[[], T]) -> T:
        """``encode()``, in the side thread if all ``texts`` together are long."""
        if sum(len(text.encode()) for text in texts) <= _LONG_BYTES:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    def _check_length(self, texts: Sequence[str], info: ModelInfo, param: str) -> None:
        """Refuse what is too long however well it is encoded."""
        least = sum(map(self._tokenizer.min_num_tokens, texts))
        limit = limit_for(info)
        if least > limit:
            message = (
                f"This model's maximum context length is {limit} tokens. "
                f"However, '{param}' has at least {least} tokens."
            )
            raise InvalidRequest(message, param=param, code="context_length_exceeded")
