"""The common way of chats and text completions, from submits to the answer.

Owns: ``generate``: submit, then either a stream of events or one whole answer; in both cases the client's leaving
cancels every choice at once.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from starlette.responses import Response
from starlette.types import Receive

from mixtral_serve.api.convert import Choice, finish_reason, usage
from mixtral_serve.api.deps import Engine
from mixtral_serve.api.formats import AnswerFormat
from mixtral_serve.api.responses import JsonResponse, until_disconnect
from mixtral_serve.api.sse import DONE, EventStream, KeepAlive
from mixtral_serve.engine.messages import Delta, Submit
from mixtral_serve.engine.stream import TokenStream

_MANY_LOGPROBS: Final = 1_000
"""Positions whose log-probabilities take some milliseconds to spell: beyond them a thread does it."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be generated and how it is to be told."""

    submits: tuple[Submit, ...]
    prompts: tuple[array[int], ...]
    format: AnswerFormat
    stream: bool
    include_usage: bool
    headers: dict[str, str]
    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    clock: Callable[[], float] = time.monotonic

    def progress(self, index: int, delta: Delta, started_s: float) -> dict[str, object]:
        """How far the prompt of choice ``index`` has come, in llama.cpp's words."""
        return {
            "total": len(self.prompts[index * len(self.prompts) // len(self.submits)]),
            "cache": delta.num_cached_tokens,
            "processed": delta.num_prompt_tokens_done,
            "time_ms": round(1000 * (self.clock() - started_s)),
        }


async def generate(generation: Generation, engine: Engine, *, receive: Receive) -> Response:
    """Run a generation and answer with it.

    Raises:
        RequestRefused, EngineUnavailable, RequestFailed, Interrupted, ClientDisconnected: before the answer began.
    """
    streams = engine.submit(generation.submits)
    if generation.stream:
        return EventStream(
            _events(generation, streams),
            on_close=lambda: _cancel(streams),
            headers=generation.headers,
            keep_alive=generation.keep_alive,
        )
    try:
        choices = await until_disconnect(receive, _collected(streams))
    finally:
        _cancel(streams)
    counts = usage(generation.prompts, choices)
    if sum(len(choice.prompt_logprobs) + len(choice.logprobs) for choice in choices) > _MANY_LOGPROBS:
        answer = await asyncio.to_thread(generation.format.answer, choices, counts)
    else:
        answer = generation.format.answer(choices, counts)
    return JsonResponse(answer, headers=generation.headers)


def _cancel(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.cancel()


async def _collected(streams: Sequence[TokenStream]) -> list[Choice]:
    """All choices in full. One stream after the other: each keeps what comes meanwhile."""
    choices: list[Choice] = []
    for stream in streams:
        choice = Choice()
        async for delta in stream:
            finish_reason(delta)  # raises where the server ended the request
            choice.add(delta)
        choices.append(choice)
    return choices


async def _events(generation: Generation, streams: Sequence[TokenStream]) -> AsyncGenerator[bytes, None]:
    spell = generation.format
    choices = [Choice() for _ in streams]
    started_s = generation.clock()
    preamble = b"".join([spell.opening(index) for index in range(len(streams))])
    async with aclosing(_merged(streams)) as deltas:
        async for index, delta in deltas:
            data = preamble
            if delta.num_prompt_tokens_done:
                data += spell.progress(index, generation.progress(index, delta, started_s))
            data += spell.chunk(index, delta)
            preamble = b""
            choices[index].count(delta)
            if data:
                yield data
    tail = spell.usage_chunk(usage(generation.prompts, choices)) if generation.include_usage else b""
    yield tail + DONE


async def _merged(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all streams as they come, each with the index of its stream."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    # At most one delta per stream waits here, the others in their streams.
    queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async for delta in stream:
                await queue.put((index, delta))
        except Exception as error:  # noqa: BLE001 (the consumer raises it)
            await queue.put(error)
        else:
            await queue.put(None)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
