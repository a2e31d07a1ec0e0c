"""The same request, sent again and again while others come and go, has the same bytes for an answer.

Over real HTTP, on the compiled kernels. The engine's own test of this law is ``tests/engine/test_with_model.py``; what
this one adds is everything above the engine: templates, grammars, tool calls, log-probabilities as text, choices.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from typing import Any, Final

import httpx
import pytest

from mixtral_serve.kernels import native

NUM_REPEATS: Final = 20
NUM_NEIGHBOURS: Final = 4
MODEL: Final = "mixtral-demo"
HOT: Final = {"model": MODEL, "seed": 11, "temperature": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
PERSON: Final = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
}
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ASKED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "chat": (
        "/v1/chat/completions",
        {**HOT, "messages": said("Tell me a story about a fox."), "n": 2, "max_tokens": 20, "logprobs": True},
    ),
    "completion": (
        "/v1/completions",
        {**HOT, "prompt": "One two three", "max_tokens": 32, "repetition_penalty": 1.2, "top_p": 0.95, "logprobs": 2},
    ),
    "grammar": (
        "/v1/chat/completions",
        {
            **HOT,
            "messages": said("Lucy is 34 years old. Answer with a JSON object with the fields name, age."),
            "max_tokens": 32,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        },
    ),
    "tools": (
        "/v1/chat/completions",
        {**HOT, "messages": said("Hello!"), "tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    ),
    "response": (
        "/v1/responses",
        {**HOT, "input": "What is the capital of France?", "max_output_tokens": 16, "metadata": {"a": "b"}},
    ),
}
NEW_EACH_TIME: Final = re.compile(
    rb'"(?:id|created|created_at|completed_at|item_id|call_id|cached_tokens)":\s*(?:"[^"]*"|[\d.]+)'
)


def without_ids(body: bytes) -> bytes:
    """Each answer has ids and times of its own, and finds more or less of its prompt in the cache."""
    return NEW_EACH_TIME.sub(b"", body)


class Load:
    """Neighbours that ask for random things, in streams or not, and of whom some leave before they are answered."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self.num_answered = self.num_left = 0

    async def run(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_NEIGHBOURS):
                group.create_task(self._neighbour(stop))

    async def _neighbour(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            path, body = self._request()
            if self._rng.random() < 0.4:
                await self._leave(path, body | {"stream": True})
                continue
            reply = await self._client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            self.num_answered += 1

    async def _leave(self, path: str, body: dict[str, Any]) -> None:
        async with self._client.stream("POST", path, json=body) as reply:
            assert reply.status_code == 200
            async for _ in reply.aiter_lines():
                break
        self.num_left += 1

    def _request(self) -> tuple[str, dict[str, Any]]:
        """Half of them begin as an asked request does, so that prefixes are shared."""
        rng = self._rng
        if rng.random() < 0.5:
            path, asked = rng.choice([ASKED[name] for name in ("chat", "completion", "grammar")])
            return path, asked | {"seed": rng.getrandbits(32), "max_tokens": rng.randint(1, 24)}
        prompt = [rng.randrange(300, 1500) for _ in range(rng.randint(1, 150))]
        # Long answers of some fill the cache while they run: that is when others are preempted.
        num_tokens = rng.choice((rng.randint(1, 24), 160))
        return "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}


async def ask(client: httpx.AsyncClient, name: str) -> bytes:
    path, body = ASKED[name]
    reply = await client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert json.loads(reply.content)["object"]
    return without_ids(reply.content)


async def compare(base_url: str) -> Load:
    async with httpx.AsyncClient(base_url=base_url, timeout=60.0) as client:
        alone = {name: await ask(client, name) for name in ASKED}
        load, stop = Load(client, seed=3), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(load.run(stop))
            for _ in range(NUM_REPEATS):
                assert (
                    dict(zip(ASKED, await asyncio.gather(*(ask(client, name) for name in ASKED)), strict=True)) == alone
                )
            stop.set()
        return load


@pytest.mark.slow
@pytest.mark.skipif(not native.is_available(), reason="the compiled kernels are not installed")
def test_an_answer_has_the_same_bytes_whatever_else_is_answered(new_server: Callable[..., Any]) -> None:
    """Few seats, small steps and a small cache: prompts are cut, requests wait, and some are preempted."""
    flags = ["--weights", "int8", "--kernels", "native", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
    with new_server(*flags, "--max-model-len", "384", "--kv-cache-memory-bytes", "450000") as server:
        load = asyncio.run(compare(server.base_url))
        assert load.num_answered > NUM_REPEATS
        assert load.num_left > NUM_REPEATS
        assert server.metric("num_preemptions_total") > 0, "a load that preempts nobody proves little"
        assert server.metric("prefix_cache_hits_total") > 0
        server.wait_until_quiet()
