"""A conversation that comes by another way than a chat completion: checked as the chat endpoint checks it.

Owns: ``checked_conversation`` and ``conversation_ids``. What ``/tokenize`` counts, ``/apply-template`` shows and
``/v1/responses`` answers is what a chat completion with the same messages would compute.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from mixtral_serve.api.body import Validated, validated
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.api.schemas.chat import ChatRequest, screened_chat
from mixtral_serve.api.schemas.refused import Screen
from mixtral_serve.contract import ModelInfo


def checked_conversation(fields: Mapping[str, Any], deps: Dependencies) -> Validated[ChatRequest]:
    """The chat request that consists of ``fields`` alone, and what of them was dropped.

    Raises:
        InvalidRequest: the chat endpoint would refuse them.
    """
    unknown_fields = deps.settings.unknown_fields
    screen = Screen(drops=unknown_fields == "warn")
    screened = screened_chat({"model": deps.model_names[0], **fields}, screen)
    checked = validated(ChatRequest, screened, unknown_fields=unknown_fields)
    checked.request.check_fields(max_n=deps.settings.max_n)
    return Validated(checked.request, (*screen.dropped, *checked.ignored))


async def conversation_ids(
    fields: Mapping[str, Any], *, deps: Dependencies, encoder: PromptEncoder, info: ModelInfo
) -> tuple[array[int], tuple[str, ...]]:
    """Token ids of the conversation in ``fields``, however many they are, and the fields that were dropped.

    Raises:
        InvalidRequest: the chat endpoint would refuse it.
        ChatTemplateError: the template refuses it.
    """
    checked = checked_conversation(fields, deps)
    asked = checked.request
    ids = await encoder.chat(asked.conversation(), info, how=asked.rendering(), may_be_too_long=True)
    return ids, checked.ignored
