"""The common way of both endpoints, from submits to the answer.

Owns: ``generate``: submit, then either a stream of events or one whole answer; in both cases the client's leaving
cancels every choice at once.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive

from mixtral_serve.api.convert import Choice, finish_reason, usage
from mixtral_serve.api.deps import Engine
from mixtral_serve.api.formats import AnswerFormat
from mixtral_serve.api.responses import JsonResponse, until_disconnect
from mixtral_serve.api.sse import DONE, EventStream
from mixtral_serve.engine.messages import Delta, Submit
from mixtral_serve.engine.stream import TokenStream


@dataclass(frozen=True, slots=True)
class Generation:
    """What is to be generated and how it is to be told."""

    submits: tuple[Submit, ...]
    prompts: tuple[array[int], ...]
    format: AnswerFormat
    stream: bool
    include_usage: bool
    headers: dict[str, str]


async def generate(generation: Generation, engine: Engine, *, receive: Receive) -> Response:
    """Run a generation and answer with it.

    Raises:
        RequestRefused, EngineUnavailable, RequestFailed, Interrupted, ClientDisconnected: before the answer began.
    """
    streams = engine.submit(generation.submits)
    if generation.stream:
        return EventStream(_events(generation, streams), on_close=lambda: _cancel(streams), headers=generation.headers)
    try:
        choices = await until_disconnect(receive, _collected(streams))
    finally:
        _cancel(streams)
    answer = generation.format.answer(choices, usage(generation.prompts, choices))
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
    preamble = b"".join([spell.opening(index) for index in range(len(streams))])
    async with aclosing(_merged(streams)) as deltas:
        async for index, delta in deltas:
            data = preamble + spell.chunk(index, delta)
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
