"""A conversation that is to be encoded and not answered: checked as the chat endpoint checks it.

Owns: ``checked_conversation`` and ``conversation_ids``. What ``/tokenize`` counts, ``/apply-template`` shows and
``/v1/responses`` answers is what a chat completion with the same messages would compute.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from mixtral_serve.api.body import validated
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.schemas.chat import ChatRequest, screened_chat
from mixtral_serve.api.schemas.refused import Screen
from mixtral_serve.contract import ModelInfo


def checked_conversation(fields: Mapping[str, Any], deps: Dependencies) -> ChatRequest:
    """The chat request that consists of ``fields`` alone.

    Raises:
        InvalidRequest: the chat endpoint would refuse them.
    """
    unknown_fields = deps.settings.unknown_fields
    screened = screened_chat({"model": deps.model_names[0], **fields}, Screen(drops=unknown_fields == "warn"))
    asked = validated(ChatRequest, screened, unknown_fields=unknown_fields).request
    asked.check_fields(max_n=deps.settings.max_n)
    return asked


async def conversation_ids(
    fields: Mapping[str, Any], *, deps: Dependencies, encoder: PromptEncoder, info: ModelInfo
) -> array[int]:
    """Token ids of the conversation in ``fields``, however many they are.

    Raises:
        InvalidRequest: the chat endpoint would refuse it.
        ChatTemplateError: the template refuses it.
    """
    asked = checked_conversation(fields, deps)
    return await encoder.chat(asked.conversation(), info, how=asked.rendering(), may_be_too_long=True)
