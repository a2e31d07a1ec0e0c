"""Encoding must not hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mixtral_serve.api.encoding import PromptEncoder
from mixtral_serve.contract import ModelInfo
from mixtral_serve.text.chat_template import load_chat_template
from mixtral_serve.text.conversation import ChatMessage
from mixtral_serve.text.tokenizer import load_tokenizer

INFO = ModelInfo(
    name="tiny",
    fingerprint="f",
    vocab_size=512,
    max_model_len=1_000_000,
    eos_token_ids=(2,),
    num_blocks=100_000,
    block_size=16,
    weights_bytes=0,
    kv_cache_bytes=0,
)
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def encoder(checkpoint: Path) -> PromptEncoder:
    tokenizer = load_tokenizer(checkpoint)
    return PromptEncoder(tokenizer, load_chat_template(checkpoint, tokenizer))


async def others_ran_during(work: Coroutine[Any, Any, Any]) -> bool:
    """Whether the loop turned before ``work`` was done."""
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    await work
    return turned.is_set()


@pytest.mark.parametrize(
    "texts", [["hello " * 5_000], ["hello "] * 128 + ["hello " * 300] * 10, ["\U0001f600" * 2_500]]
)
def test_row22_many_or_long_prompts_are_encoded_beside_the_event_loop(
    run: Run, encoder: PromptEncoder, texts: list[str]
) -> None:
    assert run(others_ran_during(encoder.texts(texts, INFO)))


def test_row22_a_long_conversation_is_encoded_beside_the_event_loop(run: Run, encoder: PromptEncoder) -> None:
    messages = [ChatMessage("user", "hello " * 1_000), ChatMessage("assistant", "hello " * 1_000)]
    assert run(others_ran_during(encoder.chat(messages, INFO)))


def test_a_short_prompt_is_encoded_on_the_spot(run: Run, encoder: PromptEncoder) -> None:
    assert not run(others_ran_during(encoder.texts(["hello", "world"], INFO)))


def test_prompts_keep_their_order(run: Run, encoder: PromptEncoder, checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    texts = [f"hello {i} " * 100 for i in range(20)]
    assert run(encoder.texts(texts, INFO)) == [tokenizer.encode(text, add_bos=True) for text in texts]
